//! One split of attention for some queries: queries times keys, and weights times values. Where queries are absorbed, keys are
//! rows of the cache, and values are the latents in them.

mod in_place;
mod packed;
mod queries;

pub(super) use queries::Queries;

use super::{
    Cpu,
    inputs::{Inputs, Packed},
    kernels::Kernels,
    sink::Sink,
};
use crate::{Device, panels::WIDTH, pool::Pool, scratch::Scratch};

const BLOCK: usize = Cpu::BLOCK;
const SPLIT: usize = Cpu::SPLIT;

/// Rows of bf16, block by block.
#[derive(Clone, Copy)]
pub(super) struct BlockRows<'a> {
    /// `[_, stride]` each: whole panels of rows, though the last ones may be seen by no query.
    pub(super) blocks: &'a [&'a [u16]],
    /// Elements from one row to the next.
    pub(super) stride: usize,
}

/// The keys and values of a split.
pub(super) struct Split<'a> {
    /// Keys, as long as queries; zeros behind.
    pub(super) keys: BlockRows<'a>,
    /// Values are the first elements of these.
    pub(super) values: BlockRows<'a>,
    /// Elements of a value.
    pub(super) width: usize,
    /// Rows that some query sees.
    pub(super) count: usize,
    /// Of scores, before the softmax.
    pub(super) scale: f32,
}

impl Split<'_> {
    /// Reduces the split for each query. A query sees the first `seen(query)` keys, at least as many as the query before; those
    /// that see none are left out.
    pub(super) fn reduce(
        &self,
        (pool, kernels): (&Pool, &dyn Kernels),
        queries: &Queries<'_>,
        seen: impl Fn(usize) -> usize,
        sink: &mut impl Sink,
    ) {
        let rows = queries.count();
        let mut scores = Scratch::take(rows.next_multiple_of(WIDTH) * SPLIT);
        match queries {
            Queries::Rows(queries) => self.score(queries.of(0), &mut scores),
            Queries::Panel { panel, in_place, .. } => self.score_in_place(*in_place, panel, &mut scores),
        }
        let blind = (0..rows).take_while(|query| seen(*query) == 0).count();
        for (query, scores) in scores.chunks_exact_mut(SPLIT).enumerate().take(rows) {
            let (seen, rest) = scores.split_at_mut(seen(query));
            rest.fill(0.0);
            if query >= blind {
                sink.statistics(query, kernels.softmax(self.scale, seen).into());
            }
        }
        let weights = Inputs { data: &scores, stride: SPLIT, width: self.count, rows, picked: None };
        let tiles = kernels.tiles(kernels.weights());
        let weights = Packed::new(pool, tiles, tiles.strip(), &[weights]);
        let sink = |query: usize, first: usize, values: &[f32; WIDTH]| {
            if query >= blind {
                sink.values(query, first, values);
            }
        };
        match queries {
            Queries::Rows(_) => self.weigh(weights.of(0), sink),
            Queries::Panel { in_place, .. } => self.weigh_in_place(*in_place, weights.of(0), sink),
        }
    }
}
