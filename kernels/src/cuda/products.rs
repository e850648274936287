//! Products with one matrix, or one a head, by the kernels that serve it.

use super::{
    CudaError, Driver,
    buffers::Growing,
    kernel::Address,
    operand::{Operand, View},
    plain::{Linear, Swiglu},
    sm90::{GroupedHeads, GroupedProduct, Tokens},
    weights::{self, CudaMatrix, Tiles},
};
use crate::{Dtype, Ffn};

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
    /// grouped blocks.
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
        let between = product.fit(driver, rows * inner)?;
        if let Some((gate_up, down)) = weights::block(driver, ffn)? {
            let gate_up_product = OneGroup { rows, inner: ffn.gate.cols, outputs: inner, gated: true, exact };
            gate_up_product.run(driver, x, gate_up, between)?;
            let down_product = OneGroup { rows, inner, outputs: ffn.down.rows, gated: false, exact };
            return down_product.run(driver, product, down, self.y);
        }
        let n = rows * inner;
        let (memory, starts) = working.parts(driver, [n * Dtype::F32.size(); 2])?;
        let [gate, up] = starts.map(|start| driver.address(memory) + start as u64);
        plain(driver, x.address(driver)?, rows, &ffn.gate, gate)?;
        plain(driver, x.address(driver)?, rows, &ffn.up, up)?;
        Swiglu { gate, up, out: between, n: n as u64 }.launch(driver)?;
        plain(driver, between, rows, &ffn.down, self.y)
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
