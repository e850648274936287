//! Many batches of one layer as one grouped FFN, and each batch's partial sums out of it.
//!
//! A *slot* is the weighted sum of one row's experts in one group. It is filled in ascending order of expert id whoever
//! else is in the batch, so that merging changes no bit.

use conclave_dispatch::ModelShape;
use conclave_kernels::cell_tree::{self, Node};
use conclave_kernels::{Device, Dtype, ExpertRows, Ffn, KernelError, activation};
use conclave_proto::v1::{ExpertBatch, PartialSum};

use crate::pair::ShardPair;
use crate::paired;

/// No expert of this group for this row.
pub(crate) const NONE: u32 = u32::MAX;

/// Buffers kept from one grouped FFN to the next.
#[derive(Default)]
pub(crate) struct Scratch {
    /// `[slots, H]`
    filled: Vec<f32>,
    rows: Vec<u32>,
    weights: Vec<f32>,
    slots: Vec<u32>,
    /// Slot of each row and group of each batch: `[batch][row][group of the batch]`.
    leaves: Vec<u32>,
    runs: Vec<Run>,
}

/// The rows of one expert in one batch.
#[derive(Clone, Copy)]
struct Run {
    expert: u32,
    batch: usize,
    start: usize,
    len: usize,
}

/// Where a batch's rows and leaves lie in the merged buffers.
#[derive(Clone, Copy)]
struct Place {
    first_row: u32,
    first_leaf: usize,
}

/// A checked batch, and the pair of the stream that it came over.
pub(crate) struct Input<'a, D: Device> {
    pub(crate) batch: &'a ExpertBatch,
    pub(crate) pair: Option<&'a ShardPair<D>>,
}

impl<D: Device> Clone for Input<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Device> Copy for Input<'_, D> {}

/// The partial sums of one batch; in the pair they have no bytes here.
#[derive(Debug, PartialEq)]
pub(crate) struct Sums {
    pub(crate) parts: Vec<PartialSum>,
    pub(crate) in_pair: bool,
}

/// Runs checked batches of one layer together. `experts(batch, expert)` finds an expert's weights.
///
/// Returns the partial sums of each batch.
///
/// # Errors
/// When the device has failed.
pub(crate) fn run<'m, D: Device>(
    device: &D,
    shape: &ModelShape,
    scratch: &mut Scratch,
    inputs: &[Input<'_, D>],
    experts: impl Fn(usize, u32) -> Option<&'m Ffn<D::Matrix>>,
) -> Result<Vec<Sums>, KernelError> {
    let places = place(scratch, inputs);
    let Scratch { filled, rows, weights, slots, leaves, runs } = scratch;
    rows.clear();
    weights.clear();
    slots.clear();
    let mut spans = Vec::new();
    let mut next_slot = 0;
    for same in runs.chunk_by(|a, b| a.expert == b.expert) {
        let begin = rows.len();
        for run in same {
            let (batch, place) = (inputs[run.batch].batch, places[run.batch]);
            let group = position(&batch.groups, shape.group_of(run.expert));
            for at in run.start..run.start + run.len {
                let row = batch.row_index[at];
                let leaf = &mut leaves[place.first_leaf + row as usize * batch.groups.len() + group];
                if *leaf == NONE {
                    *leaf = next_slot;
                    next_slot += 1;
                }
                rows.push(place.first_row + row);
                weights.push(batch.weights[at]);
                slots.push(*leaf);
            }
        }
        spans.push((same[0], begin..rows.len()));
    }
    let grouped: Vec<ExpertRows<'_, D::Matrix>> = spans
        .iter()
        .filter_map(|(run, span)| {
            let (rows, weights, slots) = (&rows[span.clone()], &weights[span.clone()], &slots[span.clone()]);
            Some(ExpertRows { ffn: experts(run.batch, run.expert)?, rows, weights, slots })
        })
        .collect();
    let leaves = places.iter().map(|place| &leaves[place.first_leaf..]);
    let batches: Vec<(Input<'_, D>, &[u32])> = inputs.iter().copied().zip(leaves).collect();
    if inputs.iter().any(|input| !input.batch.board_rows.is_empty()) {
        return paired::run(device, shape, &batches, &grouped, next_slot as usize);
    }
    filled.resize(next_slot as usize * shape.hidden, 0.0);
    let x: Vec<&[u8]> = inputs.iter().map(|input| &input.batch.x[..]).collect();
    device.grouped_ffn(&x, &grouped, filled)?;
    let slots = Slots { shape, act: device.activation(), filled };
    let sums =
        |(input, leaves): &(Input<'_, D>, &[u32])| Sums { parts: slots.sums(input.batch, leaves), in_pair: false };
    Ok(batches.iter().map(sums).collect())
}

/// Counts all rows one after another and sorts the runs by expert.
fn place<D: Device>(scratch: &mut Scratch, inputs: &[Input<'_, D>]) -> Vec<Place> {
    let Scratch { leaves, runs, .. } = scratch;
    let mut first_row = 0;
    leaves.clear();
    runs.clear();
    let mut places = Vec::with_capacity(inputs.len());
    for (index, Input { batch, .. }) in inputs.iter().enumerate() {
        places.push(Place { first_row, first_leaf: leaves.len() });
        first_row += batch.rows;
        leaves.resize(leaves.len() + batch.rows as usize * batch.groups.len(), NONE);
        let mut start = 0;
        for (&expert, &count) in batch.experts.iter().zip(&batch.counts) {
            runs.push(Run { expert, batch: index, start, len: count as usize });
            start += count as usize;
        }
    }
    runs.sort_by_key(|run| (run.expert, run.batch));
    places
}

pub(crate) fn position(groups: &[u32], group: u32) -> usize {
    groups.partition_point(|g| *g < group)
}

/// Filled slots, to be added up.
struct Slots<'a> {
    shape: &'a ModelShape,
    act: Dtype,
    filled: &'a [f32],
}

impl Slots<'_> {
    /// One sum per maximal subtree of the batch's groups; rows without an expert in it are left out.
    fn sums(&self, batch: &ExpertBatch, leaves: &[u32]) -> Vec<PartialSum> {
        let (groups, hidden) = (self.shape.groups, self.shape.hidden);
        let held: Vec<usize> = batch.groups.iter().map(|group| *group as usize).collect();
        let mut sums = Vec::new();
        let mut parts: Vec<(Node, &[f32])> = Vec::new();
        let mut total = vec![0f32; hidden];
        for node in cell_tree::maximal_nodes(groups, &held) {
            let columns = position(&batch.groups, node.first as u32)..position(&batch.groups, node.last as u32);
            let mut row_index = Vec::new();
            let mut sum = Vec::new();
            for (row, slots) in leaves.chunks(held.len()).take(batch.rows as usize).enumerate() {
                parts.clear();
                for column in columns.clone().filter(|column| slots[*column] != NONE) {
                    let (group, slot) = (held[column], slots[column] as usize);
                    parts.push((
                        Node { first: group, last: group + 1 },
                        &self.filled[slot * hidden..(slot + 1) * hidden],
                    ));
                }
                if cell_tree::sum_into(self.act, groups, node, &parts, &mut total) {
                    row_index.push(row as u32);
                    activation::encode_into(self.act, &total, &mut sum);
                }
            }
            if !row_index.is_empty() {
                sums.push(PartialSum { first: node.first as u32, last: node.last as u32, row_index, sum: sum.into() });
            }
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use conclave_kernels::Reference;
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Weights, batch, shape};
    use crate::validate::{self, Expected};

    fn sums(weights: &Weights, batches: &[&ExpertBatch]) -> Vec<Vec<PartialSum>> {
        let inputs: Vec<Input<'_, Reference>> = batches.iter().map(|batch| Input { batch, pair: None }).collect();
        let expert = |_, expert: u32| weights.experts.get(expert as usize);
        let sums = run(&weights.device, &shape(), &mut Scratch::default(), &inputs, expert).unwrap();
        sums.into_iter().map(|sums| sums.parts).collect()
    }

    #[test]
    fn a_sum_is_the_weighted_sum_of_the_definition() {
        let weights = Weights::new();
        let batch = batch(3, 6, &[0, 1]);
        let found = sums(&weights, &[&batch]);
        let mut expected: BTreeMap<u32, Vec<f64>> = BTreeMap::new();
        let mut at = 0;
        for (&expert, &count) in batch.experts.iter().zip(&batch.counts) {
            for _ in 0..count {
                let (row, weight) = (batch.row_index[at], batch.weights[at]);
                let mut x = Vec::new();
                activation::decode(Dtype::F32, &batch.x, &mut x);
                let x = x[row as usize * shape().hidden..][..shape().hidden].to_vec();
                let mut y = Vec::new();
                weights.device.ffn(&x, &weights.experts[expert as usize], &mut y);
                let sum = expected.entry(row).or_insert_with(|| vec![0.0; y.len()]);
                sum.iter_mut().zip(&y).for_each(|(sum, y)| *sum += f64::from(weight) * f64::from(*y));
                at += 1;
            }
        }
        assert_eq!(found[0].len(), 1, "groups 0 and 1 are one subtree");
        assert_eq!((found[0][0].first, found[0][0].last), (0, 2));
        assert_eq!(found[0][0].row_index, expected.keys().copied().collect::<Vec<_>>());
        let mut values = Vec::new();
        activation::decode(Dtype::F32, &found[0][0].sum, &mut values);
        for (found, expected) in values.iter().zip(expected.values().flatten()) {
            assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} for {expected}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn merged_and_alone_have_the_same_bits(
            wanted in proptest::collection::vec((0u64..100, 1u32..7, proptest::sample::subsequence(vec![0, 1, 2, 3], 1..=4)), 1..5),
        ) {
            let weights = Weights::new();
            let batches: Vec<ExpertBatch> = wanted.iter().map(|(seed, rows, groups)| batch(*seed, *rows, groups)).collect();
            let together = sums(&weights, &batches.iter().collect::<Vec<_>>());
            for (batch, together) in batches.iter().zip(together) {
                prop_assert_eq!(&sums(&weights, &[batch])[0], &together);
            }
        }

        #[test]
        fn a_batch_that_is_not_refused_can_be_run(
            seed in 0u64..100,
            edits in proptest::collection::vec((0usize..12, any::<u32>(), 0usize..8), 1..4),
        ) {
            let weights = Weights::new();
            let mut batch = batch(seed, 4, &[0, 2, 3]);
            for (field, value, at) in edits {
                crate::testing::spoil(&mut batch, field, value, at);
            }
            let expected = Expected { shape: &shape(), activation: Dtype::F32, max_rows: 64, board_rows: None };
            match validate::check(&expected, &batch) {
                Ok(()) => drop(sums(&weights, &[&batch])),
                Err(error) => prop_assert!(error.message.contains(": "), "{}", error.message),
            }
        }
    }
}
