//! Launches of a grouped block: the products of all experts, one after the other.

use std::ops::Range;

use super::{
    CudaError, Driver,
    buffers::Growing,
    kernel::Address,
    operand::{Operand, View},
    plain::{CombinePairs, GatherBf16, GroupedLinear, GroupedLinearFp8, Swiglu},
    products::blocks,
    scaled,
    sm90::{self, Tokens},
    weights::{self, CudaMatrix},
};
use crate::{Dtype, Ffn};

/// What the products of a grouped block read, and what they leave on the way.
#[derive(Debug)]
pub(super) struct Operands<M> {
    /// The row of each pair `[P, H]`.
    pub(super) x: Operand<M>,
    /// `silu(gate · x) ⊙ (up · x)` `[P, I]`
    product: Operand<M>,
    /// f32 gate and up `[P, I]`, of plain products.
    gate_up: Growing<M>,
}

impl<M> Default for Operands<M> {
    fn default() -> Self {
        Self { x: Operand::default(), product: Operand::default(), gate_up: Growing::default() }
    }
}

/// Sizes of a grouped block: `P` pairs of a row and an expert, `S` slots.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) pairs: usize,
    pub(super) slots: usize,
    pub(super) hidden: usize,
    pub(super) inner: usize,
}

/// What kernels look up, on the device; `X` experts.
pub(super) struct Index {
    /// u32 `[P]`
    pub(super) rows: Address,
    /// f32 `[P]`
    pub(super) weights: Address,
    /// u32 `[X + 1]`
    pub(super) offsets: Address,
    /// u32 `[S + 1]`
    pub(super) first: Address,
    /// u32 `[P]`
    pub(super) pairs: Address,
    /// u64 `[3 or 6, X]`: see [`matrices`].
    pub(super) matrices: Address,
}

/// Where the kernels that serve an expert find it.
pub(super) struct Served {
    /// Whether those for sm_90a do.
    sm90: bool,
    /// Rows and columns of blocks of gate, up and down, as far as these are in FP8.
    blocks: [Option<(usize, usize)>; 3],
    /// Gate, up and down; of sm_90a the map of gate with up, it again, and the map of down.
    matrices: [Address; 3],
    /// Their scales; means nothing in bf16.
    scales: [Address; 3],
}

impl Served {
    pub(super) fn new<D: Driver>(driver: &D, ffn: &Ffn<CudaMatrix<D::Memory>>) -> Result<Self, CudaError> {
        let parts = [&ffn.gate, &ffn.up, &ffn.down];
        let tiles = weights::block(driver, ffn)?;
        let matrices = match tiles {
            Some((gate_up, down)) => [gate_up.map, gate_up.map, down.map],
            None => parts.map(|matrix| matrix.address),
        };
        let scales = parts.map(|matrix| matrix.scales.map_or(0, |scales| scales.address));
        Ok(Self { sm90: tiles.is_some(), blocks: parts.map(CudaMatrix::block), matrices, scales })
    }

    fn same_kernels(&self, other: &Self) -> bool {
        (self.sm90, self.blocks) == (other.sm90, other.blocks)
    }
}

/// Experts one behind the other that the same kernels serve: what serves an expert depends on its matrices alone.
pub(super) struct Run {
    experts: Range<usize>,
    sm90: bool,
    blocks: [Option<(usize, usize)>; 3],
}

pub(super) fn runs(served: &[Served]) -> Vec<Run> {
    let mut end = 0;
    let run = |of: &[Served]| {
        let first = end;
        end += of.len();
        Run { experts: first..end, sm90: of[0].sm90, blocks: of[0].blocks }
    };
    served.chunk_by(Served::same_kernels).map(run).collect()
}

/// The addresses of all experts' gates, then those of ups and of downs; where any is in FP8, those of scales in the same order.
pub(super) fn matrices(served: &[Served]) -> Vec<Address> {
    let lists =
        |of: fn(&Served) -> &[Address; 3]| (0..3).flat_map(move |part| served.iter().map(move |one| of(one)[part]));
    let fp8 = served.iter().any(|one| one.blocks.iter().any(Option::is_some));
    lists(|one| &one.matrices).chain(lists(|one| &one.scales).take(if fp8 { 3 * served.len() } else { 0 })).collect()
}

/// Launches of one grouped block.
pub(super) struct Block<'a> {
    pub(super) sizes: Sizes,
    pub(super) index: Index,
    /// Where the rows of each expert begin `[X + 1]`.
    pub(super) offsets: &'a [u32],
}

/// What a product reads and leaves: which of the experts' matrices, and its blocks if it is in FP8.
#[derive(Clone, Copy)]
struct Product {
    matrix: usize,
    block: Option<(usize, usize)>,
    gated: bool,
    inner: usize,
    y: Address,
    outputs: usize,
}

impl Block<'_> {
    pub(super) fn gather<D: Driver>(
        &self,
        driver: &D,
        x: Address,
        out: &mut Operand<D::Memory>,
    ) -> Result<(), CudaError> {
        let Sizes { hidden, pairs, .. } = self.sizes;
        let out = out.fit(driver, pairs * hidden)?;
        GatherBf16 { x, rows: self.index.rows, out, hidden: hidden as u32, pairs: pairs as u32 }.launch(driver)
    }

    /// `y [P, H]`: what lies between gate and down of all experts first, so that it is rounded to FP8 at once.
    pub(super) fn products<D: Driver>(
        &self,
        driver: &D,
        runs: &[Run],
        operands: &mut Operands<D::Memory>,
        y: Address,
    ) -> Result<(), CudaError> {
        let Sizes { hidden, inner, pairs, .. } = self.sizes;
        let Operands { x, product, gate_up } = operands;
        let between = product.fit(driver, pairs * inner)?;
        for run in runs {
            let of = |matrix, y, gated| Product {
                matrix,
                block: run.blocks[matrix],
                gated,
                inner: hidden,
                y,
                outputs: inner,
            };
            if run.sm90 {
                self.sm90(driver, run, x, of(0, between, true))?;
                continue;
            }
            let (memory, starts) = gate_up.parts(driver, [pairs * inner * Dtype::F32.size(); 2])?;
            let [gate, up] = starts.map(|start| driver.address(memory) + start as u64);
            self.plain(driver, run, x, of(0, gate, false))?;
            self.plain(driver, run, x, of(1, up, false))?;
            self.swiglu(driver, run, [gate, up], between)?;
        }
        for run in runs {
            let down = Product { matrix: 2, block: run.blocks[2], gated: false, inner, y, outputs: hidden };
            if run.sm90 { self.sm90(driver, run, product, down) } else { self.plain(driver, run, product, down) }?;
        }
        Ok(())
    }

    /// Of the rows of some experts.
    fn swiglu<D: Driver>(&self, driver: &D, run: &Run, gate_up: [Address; 2], out: Address) -> Result<(), CudaError> {
        let [first, end] = [run.experts.start, run.experts.end].map(|at| self.offsets[at] as usize * self.sizes.inner);
        let at = |address: Address, dtype: Dtype| address + (first * dtype.size()) as u64;
        let [gate, up] = gate_up.map(|address| at(address, Dtype::F32));
        Swiglu { gate, up, out: at(out, Dtype::Bf16), n: (end - first) as u64 }.launch(driver)
    }

    /// Where a matrix of an expert is found, or (3 to 5) its scales.
    fn matrices(&self, matrix: usize, expert: usize) -> Address {
        self.index.matrices + ((matrix * (self.offsets.len() - 1) + expert) * size_of::<Address>()) as u64
    }

    /// Where it says at which row an expert begins.
    fn begin(&self, expert: usize) -> Address {
        self.index.offsets + (expert * size_of::<u32>()) as u64
    }

    /// Rows of each of some experts.
    fn rows(&self, experts: &Range<usize>) -> impl Iterator<Item = usize> {
        self.offsets[experts.start..=experts.end].windows(2).map(|ends| (ends[1] - ends[0]) as usize)
    }

    fn plain<D: Driver>(
        &self,
        driver: &D,
        run: &Run,
        x: &mut Operand<D::Memory>,
        product: Product,
    ) -> Result<(), CudaError> {
        let Product { matrix, block, inner, y, outputs, .. } = product;
        let (first, groups) = (run.experts.start, run.experts.len() as u32);
        let (weights, offsets) = (self.matrices(matrix, first), self.begin(first));
        let largest = self.rows(&run.experts).max().unwrap_or(0) as u32;
        let Some((height, width)) = block else {
            let (x, inner, outputs) = (x.address(driver)?, inner as u32, outputs as u32);
            return GroupedLinear { x, weights, offsets, y, inner, outputs, groups, largest }.launch(driver);
        };
        let x = x.scaled(driver, scaled::Rows { count: self.sizes.pairs, inner, width })?;
        GroupedLinearFp8 {
            x: x.values,
            x_scales: x.scales,
            weights,
            scales: self.matrices(3 + matrix, first),
            offsets,
            y,
            inner: inner as u32,
            outputs: outputs as u32,
            pitch: x.pitch as u32,
            height: height as u32,
            width: width as u32,
            groups,
            largest,
        }
        .launch(driver)
    }

    /// By the kernels for sm_90a, as many experts a launch as these take.
    fn sm90<D: Driver>(
        &self,
        driver: &D,
        run: &Run,
        x: &mut Operand<D::Memory>,
        product: Product,
    ) -> Result<(), CudaError> {
        for first in run.experts.clone().step_by(sm90::GROUPS) {
            let experts = first..run.experts.end.min(first + sm90::GROUPS);
            match product.block {
                None => self.sm90_bf16(driver, &experts, x, product)?,
                Some(_) => self.sm90_fp8(driver, &experts, x, product)?,
            }
        }
        Ok(())
    }

    /// Blocks for all tiles of some experts.
    fn blocks<D: Driver>(&self, driver: &D, experts: &Range<usize>, product: Product) -> u32 {
        let weight_rows = if product.gated { 2 * product.outputs } else { product.outputs };
        blocks(driver, Tokens::EXACT, self.rows(experts).map(|rows| Tokens::EXACT.tiles(rows, weight_rows)).sum())
    }

    fn sm90_bf16<D: Driver>(
        &self,
        driver: &D,
        experts: &Range<usize>,
        x: &mut Operand<D::Memory>,
        product: Product,
    ) -> Result<(), CudaError> {
        let Product { matrix, gated, inner, y, outputs, .. } = product;
        sm90::GroupedProduct {
            x: x.map(driver, View::Rows(inner))?,
            weights: self.matrices(matrix, experts.start),
            begin: self.begin(experts.start),
            end: self.begin(experts.start + 1),
            y,
            rows: 0,
            groups: experts.len() as u32,
            inner: inner as u32,
            outputs: outputs as u32,
            gated,
            tokens: Tokens::EXACT,
            blocks: self.blocks(driver, experts, product),
        }
        .launch(driver)
    }

    fn sm90_fp8<D: Driver>(
        &self,
        driver: &D,
        experts: &Range<usize>,
        x: &mut Operand<D::Memory>,
        product: Product,
    ) -> Result<(), CudaError> {
        let Product { matrix, gated, inner, y, outputs, .. } = product;
        let rows = scaled::Rows { count: self.sizes.pairs, inner, width: sm90::FP8_BLOCK };
        let [x, x_scales] = x.scaled_maps(driver, rows)?;
        sm90::GroupedProductFp8 {
            x,
            x_scales,
            weights: self.matrices(matrix, experts.start),
            scales: self.matrices(3 + matrix, experts.start),
            up_scales: if gated { self.matrices(4 + matrix, experts.start) } else { 0 },
            begin: self.begin(experts.start),
            end: self.begin(experts.start + 1),
            y,
            rows: 0,
            groups: experts.len() as u32,
            inner: inner as u32,
            outputs: outputs as u32,
            gated,
            tokens: Tokens::EXACT,
            blocks: self.blocks(driver, experts, product),
        }
        .launch(driver)
    }

    pub(super) fn combine<D: Driver>(&self, driver: &D, y: Address, out: Address) -> Result<(), CudaError> {
        let Index { weights, first, pairs, .. } = self.index;
        let (hidden, slots) = (self.sizes.hidden as u32, self.sizes.slots as u32);
        CombinePairs { y, weights, first, pairs, out, hidden, slots }.launch(driver)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_of_the_same_kernels_come_together() {
        let fp8 = Some((128, 128));
        let of = |sm90, down, at| Served { sm90, blocks: [fp8, fp8, down], matrices: [at; 3], scales: [100 + at; 3] };
        let served = [of(true, fp8, 1), of(true, fp8, 2), of(true, None, 3), of(false, None, 4), of(true, fp8, 5)];
        let found: Vec<_> = runs(&served).into_iter().map(|run| (run.experts, run.sm90, run.blocks[2])).collect();
        assert_eq!(found, [(0..2, true, fp8), (2..3, true, None), (3..4, false, None), (4..5, true, fp8)]);
        let bf16 = Served { blocks: [None; 3], ..of(false, None, 7) };
        assert_eq!(matrices(&[bf16]), [7; 3], "no scales");
        assert_eq!(matrices(&served[..2]), [1, 2, 1, 2, 1, 2, 101, 102, 101, 102, 101, 102]);
    }
}
