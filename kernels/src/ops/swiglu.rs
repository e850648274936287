//! SwiGLU: the element-wise part of a feed-forward block.

/// `silu(gate) · up` with `silu(x) = x / (1 + exp(−x))`
pub(crate) fn swiglu(gate: f32, up: f32) -> f32 {
    gate / (1.0 + libm::expf(-gate)) * up
}
