//! One split of attention for some queries, on the tiles of all other products: queries times keys, and weights times values.
//! Both are packed into panels that stay in the near caches. Where queries are absorbed, keys are rows of the cache, and
//! values are the latents in them.

use std::ops::Range;

use super::{
    Cpu,
    inputs::{Inputs, Packed, PackedRows},
    kernels::{Fetch, Kernels},
    matrix::GROUP,
    products::put,
    sink::Sink,
    strips,
};
use crate::{
    Device,
    panels::{PAIRS, WIDTH, fetch, interleave, pack_rows},
    pool::Pool,
    scratch::Scratch,
};

const BLOCK: usize = Cpu::BLOCK;
const SPLIT: usize = Cpu::SPLIT;
/// Panels of values that are packed together at least: what they take of a row fills a cache line.
const VALUE_PANELS: usize = 8;
/// How many rows ahead values are fetched.
const AHEAD: usize = 16;

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
    /// Reduces the split for each query, packed for products in bf16. A query sees the first `seen(query)` keys, at least as
    /// many as the query before; those that see none are left out.
    pub(super) fn reduce(
        &self,
        (pool, kernels): (&Pool, &dyn Kernels),
        queries: PackedRows<'_>,
        seen: impl Fn(usize) -> usize,
        sink: &mut impl Sink,
    ) {
        let rows = queries.rows();
        let mut scores = Scratch::take(rows * SPLIT);
        self.score(queries, &mut scores);
        let blind = (0..rows).take_while(|query| seen(*query) == 0).count();
        for (query, scores) in scores.chunks_exact_mut(SPLIT).enumerate() {
            let (seen, rest) = scores.split_at_mut(seen(query));
            rest.fill(0.0);
            if query >= blind {
                sink.statistics(query, kernels.softmax(self.scale, seen).into());
            }
        }
        let weights = Inputs { data: &scores, stride: SPLIT, width: self.count, rows, picked: None };
        let tiles = kernels.tiles(kernels.weights());
        let weights = Packed::new(pool, tiles, tiles.strip(), &[weights]);
        self.weigh(weights.of(0), |query, first, values| {
            if query >= blind {
                sink.values(query, first, values);
            }
        });
    }

    /// `scores [queries, SPLIT]` of all rows of the blocks. Rows are read from memory while those before them are multiplied.
    fn score(&self, queries: PackedRows<'_>, scores: &mut [f32]) {
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
            each(queries, count, sums, |query, panel, values| {
                let to = query * SPLIT + first + panel * WIDTH;
                put(values, &mut scores[to..to + WIDTH]);
            });
            first += count * WIDTH;
        }
    }

    /// The rows' values summed by weight: `sink(query, first element, values)`.
    fn weigh(&self, weights: PackedRows<'_>, mut sink: impl FnMut(usize, usize, &[f32; WIDTH])) {
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
            let panels = elements.len() / WIDTH;
            for tile in weights.all().map(|tile| weights.tile(tile)) {
                for query in tile.clone() {
                    for panel in 0..panels {
                        let (first, count) =
                            (panel / at_once * at_once, at_once.min(panels - panel / at_once * at_once));
                        let at = first * weights.rows() + tile.start * count + (panel - first) * tile.len() + query
                            - tile.start;
                        sink(query, elements.start + panel * WIDTH, &sums[at]);
                    }
                }
            }
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

/// `with(row, panel, outputs)` for all of `sums [tiles][panels][rows of the tile][16]`.
fn each(x: PackedRows<'_>, panels: usize, sums: &[[f32; WIDTH]], mut with: impl FnMut(usize, usize, &[f32; WIDTH])) {
    let places = x.all().flat_map(|tile| (0..panels).flat_map(move |panel| x.tile(tile).map(move |row| (row, panel))));
    places.zip(sums).for_each(|((row, panel), values)| with(row, panel, values));
}
