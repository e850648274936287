//! `gate_logits.cu`

use super::{Address, Shape, kernel};

/// `LOGIT_THREADS`, `LOGIT_OUTPUTS` and `LOGIT_ROWS` of `gate_logits.cuh`.
const THREADS: u32 = 256;
const OUTPUTS: u32 = 8;
const ROWS: u32 = 4;

kernel! {
    /// `y = x · Wᵀ` of rows that are not rounded.
    GateLogits("gate_logits") {
        /// f32 `[rows, inner]`
        x: Address,
        /// bf16 `[outputs, inner]`
        w: Address,
        /// f32 `[rows, outputs]`
        y: Address,
        /// Rows `T`, at most 2^18 - 4.
        rows: u32,
        /// Inputs.
        inner: u32,
        /// Outputs.
        outputs: u32,
    }
    => |it| Shape::new([it.outputs.div_ceil(OUTPUTS), it.rows.div_ceil(ROWS), 1], THREADS)
}
