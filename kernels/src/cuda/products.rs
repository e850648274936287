//! Products with one matrix, or one a head, by the kernels that serve it.

use super::{
    CudaError, Driver, LibraryProduct,
    buffers::Growing,
    kernel::Address,
    operand::{Operand, View},
    plain::{Linear, Swiglu},
    sm90::{GroupedHeads, GroupedProduct, Tokens},
    weights::{self, CudaMatrix, Tiles},
};
use crate::{Dtype, Ffn};

/// Queues `y [rows, out] = x · Wᵀ` of one matrix: by these arguments.
type Multiply<D> = fn(&D, Address, usize, &CudaMatrix<<D as Driver>::Memory>, Address) -> Result<(), CudaError>;

/// From so many rows on, the machine's library computes what need not be exact: fewer are bound by reading weights, and wait for
/// their launches, which come as graphs only if all are our own.
const LIBRARY_ROWS: usize = 128;

/// Whether the machine's library is to compute products of so many rows.
fn by_library<D: Driver>(driver: &D, exact: bool, rows: usize) -> bool {
    !exact && rows >= LIBRARY_ROWS && driver.has_library()
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
        _ if by_library(driver, exact, rows) => library(driver, x.address(driver)?, rows, w, y),
        None => plain(driver, x.address(driver)?, rows, w, y),
        Some(tiles) => OneGroup { rows, inner: w.cols, outputs: w.rows, gated: false, exact }.run(driver, x, tiles, y),
    }
}

fn plain<D: Driver>(
    driver: &D,
    x: Address,
    rows: usize,
    w: &CudaMatrix<D::Memory>,
    y: Address,
) -> Result<(), CudaError> {
    let (rows, inner, outputs) = (rows as u32, w.cols as u32, w.rows as u32);
    Linear { x, w: w.address, y, rows, inner, outputs }.launch(driver)
}

fn library<D: Driver>(
    driver: &D,
    x: Address,
    rows: usize,
    w: &CudaMatrix<D::Memory>,
    y: Address,
) -> Result<(), CudaError> {
    driver.library_product(&LibraryProduct { x, w: w.address, y, rows, inner: w.cols, outputs: w.rows })
}

/// A grouped product whose one group has all rows.
struct OneGroup {
    rows: usize,
    inner: usize,
    outputs: usize,
    gated: bool,
    exact: bool,
}

impl OneGroup {
    fn run<D: Driver>(
        &self,
        driver: &D,
        x: &mut Operand<D::Memory>,
        weights: Tiles,
        y: Address,
    ) -> Result<(), CudaError> {
        let &Self { rows, inner, outputs, gated, exact } = self;
        let weight_rows = if gated { 2 * outputs } else { outputs };
        let tokens = if exact { Tokens::EXACT } else { Tokens::fastest(rows, weight_rows, driver.multiprocessors()) };
        GroupedProduct {
            x: x.map(driver, View::Rows(inner))?,
            weights: weights.list,
            begin: 0,
            end: 0,
            y,
            rows: rows as u32,
            groups: 1,
            inner: inner as u32,
            outputs: outputs as u32,
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
        let (ffn, rows, inner, exact) = (self.ffn, self.rows, self.ffn.gate.rows, self.exact);
        if rows == 0 {
            return Ok(());
        }
        if by_library(driver, exact, rows) {
            return self.one_by_one(driver, library, x, product, working);
        }
        let Some((gate_up, down)) = weights::block(driver, ffn)? else {
            return self.one_by_one(driver, plain, x, product, working);
        };
        let between = product.fit(driver, rows * inner)?;
        let gate_up_product = OneGroup { rows, inner: ffn.gate.cols, outputs: inner, gated: true, exact };
        gate_up_product.run(driver, x, gate_up, between)?;
        let down_product = OneGroup { rows, inner, outputs: ffn.down.rows, gated: false, exact };
        down_product.run(driver, product, down, self.y)
    }

    /// By products of one matrix each, of this kind.
    fn one_by_one<D: Driver<Memory = M>>(
        &self,
        driver: &D,
        multiply: Multiply<D>,
        x: &mut Operand<M>,
        product: &mut Operand<M>,
        working: &mut Growing<M>,
    ) -> Result<(), CudaError> {
        let (ffn, rows, n) = (self.ffn, self.rows, self.rows * self.ffn.gate.rows);
        let (memory, starts) = working.parts(driver, [n * Dtype::F32.size(); 2])?;
        let [gate, up] = starts.map(|start| driver.address(memory) + start as u64);
        let (x, between) = (x.address(driver)?, product.fit(driver, n)?);
        multiply(driver, x, rows, &ffn.gate, gate)?;
        multiply(driver, x, rows, &ffn.up, up)?;
        Swiglu { gate, up, out: between, n: n as u64 }.launch(driver)?;
        multiply(driver, between, rows, &ffn.down, self.y)
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
