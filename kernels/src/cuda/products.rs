//! Products with one matrix, or one a head, by the kernels that serve it.

use super::{
    CudaError, Driver, LibraryProduct,
    buffers::Growing,
    kernel::Address,
    operand::{Operand, View},
    plain::{Linear, LinearFp8, Swiglu},
    scaled::Rows,
    sm90::{GroupedHeads, GroupedProduct, GroupedProductFp8, Tokens},
    weights::{self, CudaMatrix, Tiles},
};
use crate::{Dtype, Ffn};

/// Queues `y [rows, out] = x · Wᵀ` of one matrix: by these arguments.
type Multiply<D, M> = fn(&D, &mut Operand<M>, usize, &CudaMatrix<M>, Address) -> Result<(), CudaError>;

/// From so many rows on, the machine's library computes what need not be exact: fewer are bound by reading weights, and wait for
/// their launches, which come as graphs only if all are our own.
const LIBRARY_ROWS: usize = 128;

/// Whether the machine's library is to compute products of so many rows with these matrices. It has none of FP8 with such blocks.
fn by_library<D: Driver>(driver: &D, exact: bool, rows: usize, matrices: &[&CudaMatrix<D::Memory>]) -> bool {
    let in_bf16 = || matrices.iter().all(|matrix| matrix.scales.is_none());
    !exact && rows >= LIBRARY_ROWS && in_bf16() && driver.has_library()
}

/// Blocks for so many tiles.
pub(super) fn blocks<D: Driver>(driver: &D, tokens: Tokens, tiles: usize) -> u32 {
    tiles.min(driver.multiprocessors() * tokens.blocks_each()) as u32
}

/// Queues `y [rows, out] = x · Wᵀ`; unless it is to be `exact`, by what is fastest for so many rows.
pub(super) fn linear<D: Driver>(
    driver: &D,
    exact: bool,
    x: &mut Operand<D::Memory>,
    rows: usize,
    w: &CudaMatrix<D::Memory>,
    y: Address,
) -> Result<(), CudaError> {
    match w.tiles {
        _ if rows == 0 => Ok(()),
        _ if by_library(driver, exact, rows, &[w]) => library(driver, x, rows, w, y),
        None => plain(driver, x, rows, w, y),
        Some(tiles) => OneGroup { rows, w, up: None, weights: tiles, exact }.run(driver, x, y),
    }
}

/// The same by the plain kernels.
fn plain<D: Driver>(
    driver: &D,
    x: &mut Operand<D::Memory>,
    rows: usize,
    w: &CudaMatrix<D::Memory>,
    y: Address,
) -> Result<(), CudaError> {
    let (count, inner, outputs) = (rows as u32, w.cols as u32, w.rows as u32);
    let Some(scales) = w.scales else {
        let x = x.address(driver)?;
        return Linear { x, w: w.address, y, rows: count, inner, outputs }.launch(driver);
    };
    let (height, width) = scales.block;
    let x = x.scaled(driver, Rows { count: rows, inner: w.cols, width })?;
    LinearFp8 {
        x: x.values,
        x_scales: x.scales,
        w: w.address,
        scales: scales.address,
        y,
        rows: count,
        inner,
        outputs,
        pitch: x.pitch as u32,
        height: height as u32,
        width: width as u32,
    }
    .launch(driver)
}

fn library<D: Driver>(
    driver: &D,
    x: &mut Operand<D::Memory>,
    rows: usize,
    w: &CudaMatrix<D::Memory>,
    y: Address,
) -> Result<(), CudaError> {
    let x = x.address(driver)?;
    driver.library_product(&LibraryProduct { x, w: w.address, y, rows, inner: w.cols, outputs: w.rows })
}

/// Tiles of as many tokens as bits may depend on the number of rows.
fn tokens<D: Driver>(driver: &D, exact: bool, among: &[Tokens], rows: usize, weight_rows: usize) -> Tokens {
    if exact { Tokens::EXACT } else { Tokens::fastest(among, rows, weight_rows, driver.multiprocessors()) }
}

/// A grouped product for sm_90a whose one group has all rows.
struct OneGroup<'a, M> {
    rows: usize,
    w: &'a CudaMatrix<M>,
    /// Of a gate.
    up: Option<&'a CudaMatrix<M>>,
    /// Of the matrix, or of gate and up.
    weights: Tiles,
    exact: bool,
}

impl<M: Send + Sync + 'static> OneGroup<'_, M> {
    fn run<D: Driver<Memory = M>>(&self, driver: &D, x: &mut Operand<M>, y: Address) -> Result<(), CudaError> {
        let &Self { rows, w, up, weights, exact } = self;
        let (gated, weight_rows) = (up.is_some(), if up.is_some() { 2 * w.rows } else { w.rows });
        let (count, inner, outputs) = (rows as u32, w.cols as u32, w.rows as u32);
        let Some(scales) = w.scales else {
            let tokens = tokens(driver, exact, &Tokens::ALL, rows, weight_rows);
            let (x, blocks) =
                (x.map(driver, View::Rows(w.cols))?, blocks(driver, tokens, tokens.tiles(rows, weight_rows)));
            return GroupedProduct {
                x,
                weights: weights.list,
                begin: 0,
                end: 0,
                y,
                rows: count,
                groups: 1,
                inner,
                outputs,
                gated,
                tokens,
                blocks,
            }
            .launch(driver);
        };
        let tokens = tokens(driver, exact, &Tokens::FP8, rows, weight_rows);
        let [x, x_scales] = x.scaled_maps(driver, Rows { count: rows, inner: w.cols, width: scales.block.1 })?;
        GroupedProductFp8 {
            x,
            x_scales,
            weights: weights.list,
            scales: scales.list,
            up_scales: up.and_then(|up| up.scales).map_or(0, |scales| scales.list),
            begin: 0,
            end: 0,
            y,
            rows: count,
            groups: 1,
            inner,
            outputs,
            gated,
            tokens,
            blocks: blocks(driver, tokens, tokens.tiles(rows, weight_rows)),
        }
        .launch(driver)
    }
}

/// A SwiGLU block of some rows.
pub(super) struct Block<'a, M> {
    pub(super) ffn: &'a Ffn<CudaMatrix<M>>,
    pub(super) rows: usize,
    /// `[rows, H]`
    pub(super) y: Address,
    /// Whether bits must not depend on the number of rows.
    pub(super) exact: bool,
}

impl<M: Send + Sync + 'static> Block<'_, M> {
    /// Queues `y = down · round( silu(gate · x) ⊙ (up · x) )`: all three products by the same kind of kernels, as those of
    /// grouped blocks, or all by the library.
    pub(super) fn run<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        x: &mut Operand<M>,
        product: &mut Operand<M>,
        working: &mut Growing<M>,
    ) -> Result<(), CudaError> {
        let (ffn, rows, exact) = (self.ffn, self.rows, self.exact);
        if rows == 0 {
            return Ok(());
        }
        if by_library(driver, exact, rows, &[&ffn.gate, &ffn.up, &ffn.down]) {
            return self.one_by_one(driver, library, x, product, working);
        }
        let Some((gate_up, down)) = weights::block(driver, ffn)? else {
            return self.one_by_one(driver, plain, x, product, working);
        };
        let between = product.fit(driver, rows * ffn.gate.rows)?;
        OneGroup { rows, w: &ffn.gate, up: Some(&ffn.up), weights: gate_up, exact }.run(driver, x, between)?;
        OneGroup { rows, w: &ffn.down, up: None, weights: down, exact }.run(driver, product, self.y)
    }

    /// By products of one matrix each, of this kind.
    fn one_by_one<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        multiply: Multiply<D, M>,
        x: &mut Operand<M>,
        product: &mut Operand<M>,
        working: &mut Growing<M>,
    ) -> Result<(), CudaError> {
        let (ffn, rows, n) = (self.ffn, self.rows, self.rows * self.ffn.gate.rows);
        let between = product.fit(driver, n)?;
        let (memory, starts) = working.parts(driver, [n * Dtype::F32.size(); 2])?;
        let [gate, up] = starts.map(|start| driver.address(memory) + start as u64);
        multiply(driver, x, rows, &ffn.gate, gate)?;
        multiply(driver, x, rows, &ffn.up, up)?;
        Swiglu { gate, up, out: between, n: n as u64 }.launch(driver)?;
        multiply(driver, product, rows, &ffn.down, self.y)
    }
}

/// Queues `y [rows, n, width]`, of which the first outputs a head: a head's matrix times its `x [rows, n, inner]`, rounded.
pub(super) fn heads<D: Driver>(
    driver: &D,
    x: &mut Operand<D::Memory>,
    rows: usize,
    (w, tiles): (&CudaMatrix<D::Memory>, Tiles),
    (y, width): (Address, usize),
) -> Result<(), CudaError> {
    if rows == 0 {
        return Ok(());
    }
    let tokens = Tokens::EXACT;
    GroupedHeads {
        x: x.map(driver, View::Heads(w.count, w.cols))?,
        weights: tiles.list,
        y,
        rows: rows as u32,
        heads: w.count as u32,
        inner: w.cols as u32,
        outputs: w.rows as u32,
        width: width as u32,
        blocks: blocks(driver, tokens, w.count * tokens.tiles(rows, w.rows)),
    }
    .launch(driver)
}
