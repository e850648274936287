//! Products of a split whose keys and values are read where they lie.

use super::{BLOCK, Split};
use crate::{
    cpu::{
        inputs::PackedRows,
        kernels::{InPlace, RowsInPlace},
    },
    panels::{PAIRS, STEPS, WIDTH},
    scratch::Scratch,
};

impl Split<'_> {
    /// `scores [16, SPLIT]` of all rows of the blocks. Those of the next block are read from memory meanwhile.
    pub(super) fn score_in_place(&self, in_place: &dyn InPlace, queries: &[f32], scores: &mut [f32]) {
        let mut blocks = self.keys.blocks.iter().peekable();
        let mut first = 0;
        while let Some(data) = blocks.next() {
            let behind = blocks.peek().copied().copied().unwrap_or_default();
            let rows = RowsInPlace { data, stride: self.keys.stride };
            in_place.score(bytemuck::cast_slice(queries), rows, behind, scores, first);
            first += data.len() / self.keys.stride;
        }
    }

    /// The rows' values summed by weight: `sink(query, first element, values)`.
    pub(super) fn weigh_in_place(
        &self,
        in_place: &dyn InPlace,
        weights: PackedRows<'_>,
        mut sink: impl FnMut(usize, usize, &[f32; WIDTH]),
    ) {
        let mut rest = Scratch::take(STEPS * self.values.stride / 2);
        let strips = self.strips(bytemuck::cast_slice_mut(&mut rest));
        let mut sums = Scratch::take(2 * weights.rows() * WIDTH);
        for first in (0..self.width).step_by(PAIRS) {
            for tile in weights.all() {
                let rows = weights.tile(tile);
                let sums = &mut sums.as_chunks_mut().0[..2 * rows.len()];
                sums.fill([0.0; WIDTH]);
                in_place.weigh(weights.strip(tile, 0..weights.depth()), &strips, first, sums);
                for (at, query) in rows.clone().enumerate() {
                    sink(query, first, &sums[at]);
                    if first + WIDTH < self.width {
                        sink(query, first + WIDTH, &sums[rows.len() + at]);
                    }
                }
            }
        }
    }

    /// The values of all rows that are seen, strip by strip; in the last one zeros behind them, for which there is the memory of
    /// a strip.
    fn strips<'a>(&'a self, rest: &'a mut [u16]) -> Vec<RowsInPlace<'a>> {
        let stride = self.values.stride;
        let rows = |first: usize| &self.values.blocks[first / BLOCK][first % BLOCK * stride..];
        let whole = self.count - self.count % STEPS;
        let mut strips: Vec<RowsInPlace<'_>> = (0..whole)
            .step_by(STEPS)
            .map(|first| RowsInPlace { data: &rows(first)[..STEPS * stride], stride })
            .collect();
        if whole < self.count {
            let (seen, behind) = rest.split_at_mut((self.count - whole) * stride);
            seen.copy_from_slice(&rows(whole)[..seen.len()]);
            behind.fill(0);
            strips.push(RowsInPlace { data: rest, stride });
        }
        strips
    }
}
