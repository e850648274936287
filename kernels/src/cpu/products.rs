//! Matrix products over threads, cache blocks and tiles.

use std::ops::Range;

use super::{
    CpuMatrix,
    inputs::PackedRows,
    kernels::Fetch,
    matrix::{GROUP, Panel},
    scaled, strips,
};
use crate::{panels::WIDTH, pool::Pool, scratch::Scratch, tasks};

/// The products of the same rows with `N` matrices (one or two) of one shape.
pub(super) struct Product<'a, const N: usize> {
    pub(super) x: PackedRows<'a>,
    pub(super) w: [&'a CpuMatrix; N],
}

/// Sixteen outputs of some rows.
pub(super) struct Outputs<'a, const N: usize> {
    rows: Range<usize>,
    /// Which outputs: at most sixteen, fewer at the end of a matrix.
    pub(super) cols: Range<usize>,
    values: [&'a [[f32; WIDTH]]; N],
}

impl<'a, const N: usize> Outputs<'a, N> {
    /// Each row of the inputs, and its outputs of each matrix.
    pub(super) fn rows(&self) -> impl Iterator<Item = (usize, [&'a [f32; WIDTH]; N])> {
        let values = self.values;
        self.rows.clone().enumerate().map(move |(at, row)| (row, values.map(|values| &values[at])))
    }
}

impl<const N: usize> Product<'_, N> {
    fn work_of_panel(&self) -> usize {
        N * self.x.rows() * self.x.depth() * WIDTH
    }

    /// Panels of each matrix that are computed together.
    fn group(&self) -> usize {
        (self.at_once() / N).max(1)
    }

    /// Panels of one tile.
    fn at_once(&self) -> usize {
        self.x.tiles().panels(self.x.rows_of_tile()).min(GROUP)
    }

    /// Computes some panels and hands the outputs to `sink`. Rows are taken in blocks that stay in the second cache;
    /// each weight is read once for a block.
    pub(super) fn panels(&self, panels: Range<usize>, mut sink: impl FnMut(Outputs<'_, N>)) {
        assert!(self.w.iter().all(|w| w.depth() == self.x.depth()), "inputs of {} elements", self.x.depth());
        for block in self.x.blocks() {
            for first in panels.clone().step_by(self.group()) {
                let group = first..panels.end.min(first + self.group());
                let more = group.end < panels.end;
                self.block(block.clone(), group, more, &mut sink);
            }
        }
    }

    /// Some tiles of rows times a group of panels, behind which there may be `more`.
    fn block(&self, tiles: Range<usize>, panels: Range<usize>, more: bool, sink: &mut impl FnMut(Outputs<'_, N>)) {
        let mut w = [Panel::Bf16(&[]); GROUP];
        let w = &mut w[..panels.len() * N];
        for (w, panel) in w.chunks_exact_mut(N).zip(panels.clone()) {
            w.iter_mut().zip(self.w).for_each(|(w, matrix)| *w = matrix.panel(panel));
        }
        let rows = self.x.tile(tiles.start).start..self.x.tile(tiles.end - 1).end;
        let mut sums = Scratch::take(rows.len() * w.len() * WIDTH);
        sums.fill(0.0);
        let sums = sums.as_chunks_mut::<WIDTH>().0;
        let at_once = self.at_once();
        for (w, sums) in w.chunks(at_once).zip(sums.chunks_mut(at_once * rows.len())) {
            add_panels(self.x, tiles.clone(), w, more.then_some(w.len().div_ceil(N)), sums);
        }
        for (index, panel) in panels.enumerate() {
            let cols = panel * WIDTH..self.w[0].outputs().min((panel + 1) * WIDTH);
            for tile in tiles.clone().map(|tile| self.x.tile(tile)) {
                let values = std::array::from_fn(|n| {
                    let (part, panel) = ((index * N + n) / at_once, (index * N + n) % at_once);
                    let width = at_once.min(w.len() - part * at_once);
                    let before = part * at_once * rows.len() + width * (tile.start - rows.start);
                    &sums[before + panel * tile.len()..][..tile.len()]
                });
                sink(Outputs { rows: tile, cols: cols.clone(), values });
            }
        }
    }
}

/// Copies outputs to their place, which may have room for fewer at the end of a matrix only.
pub(super) fn put(values: &[f32; WIDTH], to: &mut [f32]) {
    match <&mut [f32; WIDTH]>::try_from(&mut *to) {
        Ok(to) => *to = *values,
        Err(_) => to.copy_from_slice(&values[..to.len()]),
    }
}

/// As [`strips::add`], of panels in any form. `next`: how many panels further on in their matrices those are that come next.
fn add_panels(
    x: PackedRows<'_>,
    tiles: Range<usize>,
    panels: &[Panel<'_>],
    next: Option<usize>,
    sums: &mut [[f32; WIDTH]],
) {
    let mut plain: [&[u16]; GROUP] = [&[]; GROUP];
    for (to, panel) in plain.iter_mut().zip(panels) {
        match panel {
            Panel::Bf16(panel) => *to = panel,
            Panel::Fp8 { .. } => return scaled::add(x, tiles, panels, next, sums),
        }
    }
    let fetch = |steps: &Range<usize>| [Fetch::Next, strips::behind(steps, x.depth(), next)];
    strips::add(x, tiles, &plain[..panels.len()], fetch, sums);
}

/// Runs products, cut by panels, on the threads of `pool`; `sink(i, output)` gets the outputs of product `i`, each once.
pub(super) fn run<const N: usize>(
    pool: &Pool,
    products: &[Product<'_, N>],
    sink: impl Fn(usize, Outputs<'_, N>) + Sync,
) {
    let cut = cut(pool, products);
    pool.run(cut.len(), |task| {
        let (product, panels) = &cut[task];
        products[*product].panels(panels.clone(), |output| sink(*product, output));
    });
}

/// Tasks of about the same work: a product, and some of its panels.
fn cut<const N: usize>(pool: &Pool, products: &[Product<'_, N>]) -> Vec<(usize, Range<usize>)> {
    let total = products.iter().map(|product| product.work_of_panel() * product.w[0].count()).sum();
    let work = tasks::work_of_one(pool, total);
    let mut cut = Vec::new();
    for (index, product) in products.iter().enumerate().filter(|(_, product)| product.x.rows() > 0) {
        // Whole tiles of panels.
        let at_once = work.div_ceil(product.work_of_panel().max(1)).next_multiple_of(product.group());
        let count = product.w[0].count();
        cut.extend((0..count).step_by(at_once).map(|first| (index, first..count.min(first + at_once))));
    }
    cut
}
