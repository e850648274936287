//! Products of a split whose keys and values are packed into panels, which stay in the near caches.

use std::ops::Range;

use super::{BLOCK, SPLIT, Split};
use crate::{
    cpu::{inputs::PackedRows, kernels::Fetch, matrix::GROUP, products::put, strips},
    panels::{PAIRS, WIDTH, fetch, interleave, pack_rows},
    scratch::Scratch,
};

/// Panels of values that are packed together at least: what they take of a row fills a cache line.
const VALUE_PANELS: usize = 8;
/// How many rows ahead values are fetched.
const AHEAD: usize = 16;

impl Split<'_> {
    /// `scores [queries, SPLIT]` of all rows of the blocks. Rows are read from memory while those before them are multiplied.
    pub(super) fn score(&self, queries: PackedRows<'_>, scores: &mut [f32]) {
        let depth = queries.depth();
        let at_once = queries.tiles().panels(queries.rows_of_tile());
        let mut sums = Scratch::take(queries.rows() * at_once * WIDTH);
        let mut packed = Scratch::take(at_once * WIDTH * depth / 2);
        let packed: &mut [u16] = bytemuck::cast_slice_mut(&mut packed);
        let mut parts =
            self.keys.blocks.iter().flat_map(|block| block.chunks(at_once * WIDTH * self.keys.stride)).peekable();
        let mut first = 0;
        while let Some(rows) = parts.next() {
            let of_panels = rows.chunks_exact(WIDTH * self.keys.stride);
            of_panels.zip(packed.chunks_exact_mut(WIDTH * depth)).for_each(|(rows, to)| pack_rows(rows, to));
            let count = rows.len() / (WIDTH * self.keys.stride);
            let panels: Vec<&[u16]> = packed.chunks_exact(WIDTH * depth).take(count).collect();
            let sums = &mut sums.as_chunks_mut().0[..queries.rows() * count];
            sums.fill([0.0; WIDTH]);
            let behind = parts.peek().copied().unwrap_or_default();
            let fetch = |steps: &Range<usize>| {
                let rows = behind.get(steps.start * WIDTH * count..).unwrap_or_default();
                [if rows.is_empty() { Fetch::Nothing } else { Fetch::Rows(rows) }, Fetch::Nothing]
            };
            strips::add(queries, queries.all(), &panels, fetch, sums);
            each(queries, sums, at_once, |query, panel, values| {
                let to = query * SPLIT + first + panel * WIDTH;
                put(values, &mut scores[to..to + WIDTH]);
            });
            first += count * WIDTH;
        }
    }

    /// The rows' values summed by weight: `sink(query, first element, values)`.
    pub(super) fn weigh(&self, weights: PackedRows<'_>, mut sink: impl FnMut(usize, usize, &[f32; WIDTH])) {
        let at_once = weights.tiles().panels(weights.rows_of_tile());
        let together = at_once.max(VALUE_PANELS) * WIDTH;
        let mut packed = Scratch::take(together * weights.tiles().strip().min(weights.depth()) / 2);
        let packed: &mut [u16] = bytemuck::cast_slice_mut(&mut packed);
        let mut sums = Scratch::take(together * weights.rows());
        let length = self.width.next_multiple_of(WIDTH);
        for elements in (0..length).step_by(together).map(|first| first..length.min(first + together)) {
            let sums = &mut sums.as_chunks_mut().0[..elements.len() / WIDTH * weights.rows()];
            sums.fill([0.0; WIDTH]);
            for steps in weights.strips() {
                let packed = &mut packed[..elements.len() * steps.len()];
                self.pack_values(elements.clone(), steps.clone(), packed);
                let panels: Vec<&[u16]> = packed.chunks_exact(WIDTH * steps.len()).collect();
                for (panels, sums) in panels.chunks(at_once).zip(sums.chunks_mut(at_once * weights.rows())) {
                    let nothing = [Fetch::Nothing; 2];
                    strips::add_strip(weights, weights.all(), steps.clone(), (panels, None), nothing, sums);
                }
            }
            each(weights, sums, at_once, |query, panel, values| {
                sink(query, elements.start + panel * WIDTH, values);
            });
        }
    }

    /// Some elements of some rows, an even number, as panels in which rows are steps; zeros past those that are seen.
    fn pack_values(&self, elements: Range<usize>, rows: Range<usize>, to: &mut [u16]) {
        let length = WIDTH * rows.len();
        for (pair, first) in rows.step_by(2).enumerate() {
            let (a, b) = (self.elements(first, &elements), self.elements(first + 1, &elements));
            fetch(self.elements(first + AHEAD, &elements));
            fetch(self.elements(first + AHEAD + 1, &elements));
            interleave(a, b, length, &mut to[pair * PAIRS..]);
        }
    }

    fn elements(&self, row: usize, elements: &Range<usize>) -> &[u16] {
        const UNSEEN: [u16; GROUP * WIDTH] = [0; _];
        match row < self.count {
            true => &self.values.blocks[row / BLOCK][row % BLOCK * self.values.stride..][elements.clone()],
            false => &UNSEEN[..elements.len()],
        }
    }
}

/// `with(row, panel, outputs)` for all of `sums [parts][tiles][panels][rows of the tile][16]`, row by row: what follows has one in
/// its hands at a time. Each part has `at_once` panels, the last one maybe fewer.
fn each(x: PackedRows<'_>, sums: &[[f32; WIDTH]], at_once: usize, mut with: impl FnMut(usize, usize, &[f32; WIDTH])) {
    let panels = sums.len() / x.rows();
    for tile in x.all().map(|tile| x.tile(tile)) {
        for row in tile.clone() {
            let mut first = 0;
            while first < panels {
                let together = at_once.min(panels - first);
                let sums = &sums[first * x.rows() + tile.start * together + row - tile.start..];
                (0..together).for_each(|panel| with(row, first + panel, &sums[panel * tile.len()]));
                first += together;
            }
        }
    }
}
