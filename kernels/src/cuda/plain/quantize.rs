//! `quantize.cu`

use super::{Address, Shape, kernel};

const THREADS: u32 = 256;
/// Scales that a block makes: one a warp.
const SCALES: u32 = THREADS / 32;

kernel! {
    /// Rows to FP8 e4m3 with a scale for each row and `width` elements.
    Quantize("quantize") {
        /// bf16 `[rows, inner]`
        x: Address,
        /// e4m3 `[rows, inner]`
        out: Address,
        /// f32 `[ceil(inner / width), pitch]`
        scales: Address,
        /// Rows.
        rows: u32,
        /// Elements of a row.
        inner: u32,
        /// Elements of a scale.
        width: u32,
        /// At least `rows`.
        pitch: u32,
    }
    => |it| Shape::new([(it.rows * it.inner.div_ceil(it.width)).div_ceil(SCALES), 1, 1], THREADS)
}
