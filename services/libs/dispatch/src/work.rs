//! The rows and experts of one message to a shard. Pure.

use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};
use conclave_kernels::cell_tree::{self, Node};
use conclave_proto::v1::{Activation, ExpertBatch, WorkId};

use crate::gate::Choices;
use crate::input::LayerInput;
use crate::plan::Demand;
use crate::shape::ModelShape;

/// What one message asks of a shard, and what its answer has to look like.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Work {
    /// Groups asked for, ascending.
    pub(crate) groups: Vec<u32>,
    /// Rows of the layer that are in the message, ascending.
    pub(crate) rows: Vec<u32>,
    /// Experts in demand, ascending.
    pub(crate) experts: Vec<u32>,
    /// Rows of each expert.
    pub(crate) counts: Vec<u32>,
    /// Rows of each expert one after another, as indices into `rows`.
    pub(crate) row_index: Vec<u32>,
    /// Weight beside each `row_index`.
    pub(crate) weights: Vec<f32>,
}

/// A sum that an answer has to hold: the subtree, and the rows (as indices into [`Work::rows`]) with an expert in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExpectedSum {
    /// Groups `[first, last)`.
    pub(crate) node: Node,
    /// Ascending.
    pub(crate) rows: Vec<u32>,
}

/// Pairs per group of the rows in `span`, for the groups that have any, ascending.
pub(crate) fn demand(shape: &ModelShape, choices: &Choices, span: &Range<usize>) -> Vec<Demand> {
    let mut pairs = vec![0u32; shape.groups];
    let k = choices.top_k;
    for &expert in &choices.experts[span.start * k..span.end * k] {
        pairs[shape.group_of(expert) as usize] += 1;
    }
    let some = pairs.into_iter().enumerate().filter(|(_, pairs)| *pairs > 0);
    some.map(|(group, pairs)| Demand { group: group as u32, pairs }).collect()
}

/// Splits the rows of `span` with an expert in `groups` into spans of at most `limit` such rows.
pub(crate) fn spans(
    shape: &ModelShape,
    choices: &Choices,
    groups: &[u32],
    span: &Range<usize>,
    limit: usize,
) -> Vec<Range<usize>> {
    let touched = |row: &usize| choices.row(*row).0.iter().any(|e| groups.contains(&shape.group_of(*e)));
    let rows: Vec<usize> = span.clone().filter(touched).collect();
    rows.chunks(limit.max(1)).map(|chunk| chunk[0]..chunk[chunk.len() - 1] + 1).collect()
}

/// What to ask of a shard for `groups` over the rows in `span`.
///
/// `idle` groups have no row in the whole layer; naming those that the shard holds as well joins subtrees, so that fewer
/// sums come back.
pub(crate) fn build(shape: &ModelShape, choices: &Choices, groups: &[u32], idle: &[u32], span: &Range<usize>) -> Work {
    let mut rows = Vec::new();
    let mut by_expert: Vec<(u32, u32, f32)> = Vec::new();
    for row in span.clone() {
        let (experts, weights) = choices.row(row);
        let mut taken = false;
        for (&expert, &weight) in experts.iter().zip(weights) {
            if groups.contains(&shape.group_of(expert)) {
                by_expert.push((expert, rows.len() as u32, weight));
                taken = true;
            }
        }
        if taken {
            rows.push(row as u32);
        }
    }
    by_expert.sort_by_key(|(expert, row, _)| (*expert, *row));
    let mut all: Vec<u32> = groups.iter().chain(idle).copied().collect();
    all.sort_unstable();
    all.dedup();
    let mut work = Work {
        groups: all,
        rows,
        experts: Vec::new(),
        counts: Vec::new(),
        row_index: by_expert.iter().map(|(_, row, _)| *row).collect(),
        weights: by_expert.iter().map(|(_, _, weight)| *weight).collect(),
    };
    for chunk in by_expert.chunk_by(|a, b| a.0 == b.0) {
        work.experts.push(chunk[0].0);
        work.counts.push(chunk.len() as u32);
    }
    work
}

impl Work {
    /// (row, expert) pairs.
    pub(crate) fn pairs(&self) -> usize {
        self.row_index.len()
    }

    /// The message. The rows are copied only where they are not all rows of the layer.
    pub(crate) fn batch(&self, shape: &ModelShape, input: &LayerInput, id: WorkId, budget_us: u64) -> ExpertBatch {
        let x = self.gather(&input.x, shape.hidden * input.activation.size(), input.rows);
        ExpertBatch { x, ..self.without_rows(shape, input, id, budget_us) }
    }

    /// The message where the layer's rows are on the caller's board.
    pub(crate) fn batch_of_board(
        &self,
        shape: &ModelShape,
        input: &LayerInput,
        id: WorkId,
        budget_us: u64,
    ) -> ExpertBatch {
        ExpertBatch { board_rows: self.rows.clone(), ..self.without_rows(shape, input, id, budget_us) }
    }

    fn without_rows(&self, shape: &ModelShape, input: &LayerInput, id: WorkId, budget_us: u64) -> ExpertBatch {
        ExpertBatch {
            id: Some(id),
            activation: Activation::from(input.activation).into(),
            rows: self.rows.len() as u32,
            hidden: shape.hidden as u32,
            groups: self.groups.clone(),
            experts: self.experts.clone(),
            counts: self.counts.clone(),
            row_index: self.row_index.clone(),
            weights: self.weights.clone(),
            budget_us,
            ..ExpertBatch::default()
        }
    }

    fn gather(&self, x: &Bytes, row_bytes: usize, all_rows: usize) -> Bytes {
        if self.rows.len() == all_rows {
            return x.clone();
        }
        let (first, last) = (self.rows.first(), self.rows.last());
        if let (Some(&first), Some(&last)) = (first, last)
            && (last - first) as usize + 1 == self.rows.len()
        {
            return x.slice(first as usize * row_bytes..(last as usize + 1) * row_bytes);
        }
        let mut out = BytesMut::with_capacity(self.rows.len() * row_bytes);
        for &row in &self.rows {
            out.put_slice(&x[row as usize * row_bytes..(row as usize + 1) * row_bytes]);
        }
        out.freeze()
    }

    /// The sums that a right answer holds, ascending.
    pub(crate) fn expected(&self, shape: &ModelShape) -> Vec<ExpectedSum> {
        let held: Vec<usize> = self.groups.iter().map(|g| *g as usize).collect();
        let mut touched = vec![false; self.rows.len()];
        let mut sums = Vec::new();
        for node in cell_tree::maximal_nodes(shape.groups, &held) {
            touched.fill(false);
            let mut start = 0;
            for (&expert, &count) in self.experts.iter().zip(&self.counts) {
                let group = shape.group_of(expert) as usize;
                let end = start + count as usize;
                if (node.first..node.last).contains(&group) {
                    self.row_index[start..end].iter().for_each(|row| touched[*row as usize] = true);
                }
                start = end;
            }
            let rows: Vec<u32> = (0..touched.len() as u32).filter(|row| touched[*row as usize]).collect();
            if !rows.is_empty() {
                sums.push(ExpectedSum { node, rows });
            }
        }
        sums
    }
}
