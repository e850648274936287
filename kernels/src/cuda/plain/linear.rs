//! `linear.cu`, and the tiles that other products share.

use super::{Address, Shape, kernel};

/// `TILE_ROWS`, `TILE_OUTPUTS` and `TILE_THREADS` of `linear.cuh`.
const ROWS: u32 = 16;
const OUTPUTS: u32 = 64;
const THREADS: u32 = 256;

/// Tiles of `count` products of the same size.
pub(super) fn tiles(rows: u32, outputs: u32, count: u32) -> Shape {
    Shape::new([outputs.div_ceil(OUTPUTS), rows.div_ceil(ROWS), count], THREADS)
}

kernel! {
    /// `y = x · Wᵀ` of rows in bf16.
    Linear("linear") {
        /// bf16 `[rows, inner]`
        x: Address,
        /// bf16 `[outputs, inner]`
        w: Address,
        /// f32 `[rows, outputs]`
        y: Address,
        /// Rows `T`, at most 2^20.
        rows: u32,
        /// Inputs.
        inner: u32,
        /// Outputs.
        outputs: u32,
    }
    => |it| tiles(it.rows, it.outputs, 1)
}

kernel! {
    /// The same in FP8 e4m3, as [`GroupedLinearFp8`](super::GroupedLinearFp8) of one group.
    LinearFp8("linear_fp8") {
        /// e4m3 `[rows, inner]`
        x: Address,
        /// f32 `[ceil(inner / width), pitch]`
        x_scales: Address,
        /// e4m3 `[outputs, inner]`
        w: Address,
        /// f32 `[ceil(outputs / height), ceil(inner / width)]`
        scales: Address,
        /// f32 `[rows, outputs]`
        y: Address,
        /// Rows `T`, at most 2^20.
        rows: u32,
        /// Inputs.
        inner: u32,
        /// Outputs.
        outputs: u32,
        /// At least `T`.
        pitch: u32,
        /// Outputs of a block.
        height: u32,
        /// Inputs of a block, and of a scale of `x`.
        width: u32,
    }
    => |it| tiles(it.rows, it.outputs, 1)
}
