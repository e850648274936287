//! Inputs of matrix products: rows in a buffer, and rows packed for tiles.
#![allow(unsafe_code)]

use std::ops::Range;

use super::kernels::{TILE_ROWS as ROWS, Tiles};
use crate::{grid::Grid, panels::STEPS, pool::Pool, scratch::Scratch, tasks};

/// Rows of f32 that lie at equal distances in a buffer.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    /// From the first row on.
    pub(super) data: &'a [f32],
    /// Elements from one row to the next.
    pub(super) stride: usize,
    /// Elements of one row.
    pub(super) width: usize,
    /// How many rows.
    pub(super) rows: usize,
    /// Which rows, where not the first ones.
    pub(super) picked: Option<&'a [u32]>,
}

impl<'a> Inputs<'a> {
    /// `data [rows, width]`
    pub(super) fn new(data: &'a [f32], width: usize) -> Self {
        Self { data, stride: width, width, rows: data.len() / width.max(1), picked: None }
    }

    pub(super) fn row(&self, index: usize) -> &'a [f32] {
        let row = self.picked.map_or(index, |picked| picked[index] as usize);
        &self.data[row * self.stride..][..self.width]
    }
}

/// The inputs of several products, packed for tiles.
pub(super) struct Packed<'k> {
    tiles: &'k dyn Tiles,
    strip: usize,
    memory: Scratch,
    layouts: Vec<Layout>,
}

/// Where the rows of one product lie: tile after tile, all of about the same number of rows.
#[derive(Clone, Copy)]
struct Layout {
    /// Of the first tile in the memory of all.
    start: usize,
    rows: usize,
    /// Steps along the inner dimension, with padding.
    depth: usize,
    /// Number of tiles.
    count: usize,
    density: usize,
}

impl Layout {
    fn new(start: usize, input: &Inputs<'_>, tiles: &dyn Tiles) -> Self {
        let (rows, depth) = (input.rows, input.width.next_multiple_of(STEPS));
        Self { start, rows, depth, count: rows.div_ceil(tiles.rows()), density: tiles.density() }
    }

    /// Rows of a tile.
    fn tile(&self, index: usize) -> Range<usize> {
        self.rows * index / self.count..self.rows * (index + 1) / self.count
    }

    /// Elements of some steps of a tile.
    fn place(&self, tile: usize, steps: Range<usize>) -> Range<usize> {
        let rows = self.tile(tile);
        let of = |row: usize, rows: usize, step: usize| self.start + (row * self.depth + rows * step) / self.density;
        of(rows.start, rows.len(), steps.start)..of(rows.start, rows.len(), steps.end)
    }

    fn length(&self) -> usize {
        self.rows * self.depth / self.density
    }
}

impl<'k> Packed<'k> {
    /// Packs the inputs of products in strips of so many steps, on the threads of `pool`.
    pub(super) fn new(pool: &Pool, tiles: &'k dyn Tiles, strip: usize, inputs: &[Inputs<'_>]) -> Self {
        let mut layouts: Vec<Layout> = Vec::with_capacity(inputs.len());
        for input in inputs {
            let start = layouts.last().map_or(0, |last| last.start + last.length());
            layouts.push(Layout::new(start, input, tiles));
        }
        let cut: Vec<(usize, usize)> = layouts
            .iter()
            .enumerate()
            .flat_map(|(index, layout)| (0..layout.count).map(move |tile| (index, tile)))
            .collect();
        let length = layouts.iter().map(Layout::length).sum();
        let mut memory = Scratch::take(length);
        let grid = Grid::new(&mut memory, length);
        let at_once = tasks::at_once(pool, cut.len(), length / cut.len().max(1));
        pool.run(cut.len().div_ceil(at_once), |task| {
            for (index, tile) in cut.iter().skip(task * at_once).take(at_once) {
                let (input, layout) = (&inputs[*index], &layouts[*index]);
                let mut rows: [&[f32]; ROWS] = [&[]; ROWS];
                let rows = &mut rows[..layout.tile(*tile).len()];
                rows.iter_mut().zip(layout.tile(*tile)).for_each(|(to, row)| *to = input.row(row));
                // SAFETY: each tile has a place of its own, and is packed by one task.
                tiles.pack(rows, strip, unsafe { grid.part(0, layout.place(*tile, 0..layout.depth)) });
            }
        });
        Self { tiles, strip, memory, layouts }
    }

    /// The inputs of product `index`.
    pub(super) fn of(&self, index: usize) -> PackedRows<'_> {
        PackedRows { tiles: self.tiles, steps: self.strip, memory: &self.memory, layout: self.layouts[index] }
    }
}

/// The packed inputs of one product.
#[derive(Clone, Copy)]
pub(super) struct PackedRows<'a> {
    tiles: &'a dyn Tiles,
    /// Of a strip.
    steps: usize,
    memory: &'a [f32],
    layout: Layout,
}

impl<'a> PackedRows<'a> {
    /// The products that the rows are packed for.
    pub(super) fn tiles(&self) -> &'a dyn Tiles {
        self.tiles
    }

    pub(super) fn rows(&self) -> usize {
        self.layout.rows
    }

    /// Steps along the inner dimension, with padding.
    pub(super) fn depth(&self) -> usize {
        self.layout.depth
    }

    /// All tiles.
    pub(super) fn all(&self) -> Range<usize> {
        0..self.layout.count
    }

    /// Rows of the largest tile.
    pub(super) fn rows_of_tile(&self) -> usize {
        self.layout.rows.div_ceil(self.layout.count.max(1))
    }

    /// Rows of a tile.
    pub(super) fn tile(&self, index: usize) -> Range<usize> {
        self.layout.tile(index)
    }

    /// The inner dimension, strip by strip.
    pub(super) fn strips(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (depth, steps) = (self.layout.depth, self.steps);
        (0..depth).step_by(steps).map(move |first| first..depth.min(first + steps))
    }

    /// Some steps of a strip of a tile, packed.
    pub(super) fn strip(&self, tile: usize, steps: Range<usize>) -> &'a [f32] {
        &self.memory[self.layout.place(tile, steps)]
    }

    /// Tiles that stay in the second cache together.
    pub(super) fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let Layout { count, .. } = self.layout;
        let bytes = self.layout.length() * size_of::<f32>();
        let blocks = bytes.div_ceil(self.tiles.block()).clamp(1, count.max(1));
        (0..blocks)
            .map(move |block| count * block / blocks..count * (block + 1) / blocks)
            .filter(|tiles| !tiles.is_empty())
    }
}
