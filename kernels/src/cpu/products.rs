//! Matrix products over threads and tiles.

use std::ops::Range;

use super::kernels::{Kernels, TILE_OUTPUTS, TILE_PANELS, TILE_ROWS, panels_at_once};
use crate::{
    panels::{Panels, WIDTH},
    pool::Pool,
    tasks,
};

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

    fn row(&self, index: usize) -> &'a [f32] {
        let row = self.picked.map_or(index, |picked| picked[index] as usize);
        &self.data[row * self.stride..][..self.width]
    }
}

/// The products of the same rows with `N` matrices (one or two) of one shape.
pub(super) struct Product<'a, const N: usize> {
    pub(super) x: Inputs<'a>,
    pub(super) w: [&'a Panels<u16>; N],
}

/// Sixteen outputs of one row.
pub(super) struct Output<'a, const N: usize> {
    /// Row of the inputs.
    pub(super) row: usize,
    /// Which outputs: at most sixteen, fewer at the end of a matrix.
    pub(super) cols: Range<usize>,
    /// The outputs of each matrix.
    pub(super) values: [&'a [f32; WIDTH]; N],
}

impl<const N: usize> Product<'_, N> {
    fn work_of_panel(&self) -> usize {
        N * self.x.rows * self.x.width * WIDTH
    }

    /// Computes some panels and hands each row's outputs to `sink`; each weight is read once for up to six rows.
    pub(super) fn panels(&self, kernels: &dyn Kernels, panels: Range<usize>, mut sink: impl FnMut(Output<'_, N>)) {
        assert!(self.w.iter().all(|w| w.inputs() == self.x.width), "inputs of {} elements", self.x.width);
        let tiles = self.x.rows.div_ceil(TILE_ROWS);
        let at_once = if tiles == 1 { (panels_at_once(self.x.rows) / N).max(1) } else { 1 };
        for first in panels.clone().step_by(at_once) {
            let panels = first..panels.end.min(first + at_once);
            for tile in 0..tiles {
                let rows = self.x.rows * tile / tiles..self.x.rows * (tile + 1) / tiles;
                self.tile(kernels, rows, panels.clone(), &mut sink);
            }
        }
    }

    /// At most six rows and, with all `N` matrices, as many panels as a tile takes, or one panel of each.
    fn tile(
        &self,
        kernels: &dyn Kernels,
        rows: Range<usize>,
        panels: Range<usize>,
        sink: &mut impl FnMut(Output<'_, N>),
    ) {
        let mut x: [&[f32]; TILE_ROWS] = [&[]; TILE_ROWS];
        let x = &mut x[..rows.len()];
        x.iter_mut().zip(rows.clone()).for_each(|(x, row)| *x = self.x.row(row));
        let mut w: [&[u16]; TILE_PANELS] = [&[]; TILE_PANELS];
        let w = &mut w[..panels.len() * N];
        for (w, panel) in w.chunks_exact_mut(N).zip(panels.clone()) {
            w.iter_mut().zip(self.w).for_each(|(w, matrix)| *w = matrix.panel(panel));
        }
        let mut out = [[0.0; WIDTH]; TILE_OUTPUTS];
        let part = panels_at_once(x.len());
        for (w, out) in w.chunks(part).zip(out.chunks_mut(part * x.len())) {
            kernels.tile(x, w, out);
        }
        for (index, panel) in panels.enumerate() {
            let cols = panel * WIDTH..self.w[0].outputs().min((panel + 1) * WIDTH);
            for (at, row) in rows.clone().enumerate() {
                let values = std::array::from_fn(|n| &out[(index * N + n) * x.len() + at]);
                sink(Output { row, cols: cols.clone(), values });
            }
        }
    }
}

/// Runs products, cut by panels, on the threads of `pool`; `sink(i, output)` gets the outputs of product `i`, each once.
pub(super) fn run<const N: usize>(
    pool: &Pool,
    kernels: &dyn Kernels,
    products: &[Product<'_, N>],
    sink: impl Fn(usize, Output<'_, N>) + Sync,
) {
    let cut = cut(pool, products);
    pool.run(cut.len(), |task| {
        let (product, panels) = &cut[task];
        products[*product].panels(kernels, panels.clone(), |output| sink(*product, output));
    });
}

/// Tasks of about the same work: a product, and some of its panels.
fn cut<const N: usize>(pool: &Pool, products: &[Product<'_, N>]) -> Vec<(usize, Range<usize>)> {
    let total = products.iter().map(|product| product.work_of_panel() * product.w[0].count()).sum();
    let work = tasks::work_of_one(pool, total);
    let mut cut = Vec::new();
    for (index, product) in products.iter().enumerate().filter(|(_, product)| product.x.rows > 0) {
        // Whole tiles of panels.
        let at_once = work.div_ceil(product.work_of_panel().max(1)).next_multiple_of(TILE_PANELS);
        let count = product.w[0].count();
        cut.extend((0..count).step_by(at_once).map(|first| (index, first..count.min(first + at_once))));
    }
    cut
}
