//! `sm90_grouped_linear_fp8.cu` and `sm90_quantize.cu`: products in FP8 e4m3.

use super::{Address, Shape, Tokens, kernel};

/// Weights of a block and activations of a scale, along the inner dimension; outputs of a block.
pub const FP8_BLOCK: usize = 128;

/// Whether the copy engine takes rows of `inner` elements of e4m3, whole 16 bytes, and the kernels blocks of this shape.
pub fn fits_fp8(inner: usize, block: (usize, usize)) -> bool {
    inner > 0 && inner.is_multiple_of(16) && block == (FP8_BLOCK, FP8_BLOCK)
}

/// There is none for 256 tokens, which the driver then says.
fn shape(tokens: Tokens, blocks: u32) -> Shape {
    let (threads, shared) = match tokens {
        Tokens::T16 => (256, 87_172),
        Tokens::T64 => (256, 104_036),
        Tokens::T128 | Tokens::T256 => (384, 203_876),
    };
    Shape::new([blocks, 1, 1], threads).with_bytes(shared)
}

kernel! {
    /// As [`GroupedProduct`](super::GroupedProduct) in bf16; weights have a scale for each 128 x 128 of them, activations one
    /// for each token and 128 elements.
    GroupedProductFp8(|it| match (it.gated, it.tokens) {
        (false, Tokens::T16) => "sm90_grouped_linear_fp8_16",
        (false, Tokens::T64) => "sm90_grouped_linear_fp8_64",
        (false, Tokens::T128) => "sm90_grouped_linear_fp8_128",
        (false, Tokens::T256) => "sm90_grouped_linear_fp8_256",
        (true, Tokens::T16) => "sm90_grouped_gated_fp8_16",
        (true, Tokens::T64) => "sm90_grouped_gated_fp8_64",
        (true, Tokens::T128) => "sm90_grouped_gated_fp8_128",
        (true, Tokens::T256) => "sm90_grouped_gated_fp8_256",
    }) {
        /// Map of e4m3 `[P, inner]`, tiles of 16 rows
        x: Address,
        /// Map of f32 `[ceil(inner / 128), P]`, see [`maps::scales`](super::maps::scales)
        x_scales: Address,
        /// Addresses `[X]` of maps of e4m3 `[outputs, inner]`, tiles of 64 rows; where gated, of gate and up, see
        /// [`maps::pair`](super::maps::pair), one added where up comes first
        weights: Address,
        /// Addresses `[X]` of f32 `[ceil(outputs / 128), ceil(inner / 128)]`; where gated, of gates
        scales: Address,
        /// The same of ups; means nothing where not gated.
        up_scales: Address,
        /// u32 `[X]`: group `g` has rows `begin[g]..end[g]`; 0: each has the first `rows` rows
        begin: Address,
        /// u32 `[X]`, or 0 likewise
        end: Address,
        /// f32 `[P, outputs]`; bf16 where gated
        y: Address,
        /// Rows of a group where there is no `begin`.
        rows: u32,
        /// Groups `X`, at most [`GROUPS`](super::GROUPS).
        groups: u32,
        /// Inputs, a multiple of 16.
        inner: u32,
        /// Outputs; where gated, a multiple of 8.
        outputs: u32,
    } over {
        /// Whether each group has a gate and an up.
        gated: bool,
        /// Tokens of a tile.
        tokens: Tokens,
        /// Blocks, which take tiles in turn.
        blocks: u32,
    }
    => |it| shape(it.tokens, it.blocks)
}

kernel! {
    /// Activations to e4m3 with a scale for each token and 128 elements.
    Quantize("sm90_quantize") {
        /// bf16 `[P, inner]`
        x: Address,
        /// e4m3 `[P, inner]`
        out: Address,
        /// f32 `[ceil(inner / 128), pitch]`
        scales: Address,
        /// `P`
        rows: u32,
        /// Elements of a row, a multiple of 8.
        inner: u32,
        /// At least `P`.
        pitch: u32,
    }
    => |it| Shape::new([(it.rows * it.inner.div_ceil(128)).div_ceil(8), 1, 1], 256)
}
