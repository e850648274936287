//! `grouped_linear.cu`

use super::{Address, kernel, linear::tiles};

kernel! {
    /// `y = x · Wᵀ` where each group of rows has a matrix of its own.
    GroupedLinear("grouped_linear") {
        /// bf16 `[P, inner]`
        x: Address,
        /// Addresses `[X]` of bf16 `[outputs, inner]`.
        weights: Address,
        /// u32 `[X + 1]`: group `g` has rows `offsets[g]..offsets[g + 1]`.
        offsets: Address,
        /// f32 `[P, outputs]`
        y: Address,
        /// Inputs.
        inner: u32,
        /// Outputs.
        outputs: u32,
    } over {
        /// Groups `X`, at most 65,535.
        groups: u32,
        /// Rows of the largest group, at most 2^20.
        largest: u32,
    }
    => |it| tiles(it.largest, it.outputs, it.groups)
}

kernel! {
    /// The same in FP8 e4m3: rows have a scale for each `width` elements, weights one for each block of `height` x `width`. The
    /// chain of `width` inputs is multiplied by the product of the two; these products are added in ascending order.
    GroupedLinearFp8("grouped_linear_fp8") {
        /// e4m3 `[P, inner]`
        x: Address,
        /// f32 `[ceil(inner / width), pitch]`
        x_scales: Address,
        /// Addresses `[X]` of e4m3 `[outputs, inner]`.
        weights: Address,
        /// Addresses `[X]` of f32 `[ceil(outputs / height), ceil(inner / width)]`.
        scales: Address,
        /// u32 `[X + 1]`: group `g` has rows `offsets[g]..offsets[g + 1]`.
        offsets: Address,
        /// f32 `[P, outputs]`
        y: Address,
        /// Inputs.
        inner: u32,
        /// Outputs.
        outputs: u32,
        /// At least `P`.
        pitch: u32,
        /// Outputs of a block.
        height: u32,
        /// Inputs of a block, and of a scale of `x`.
        width: u32,
    } over {
        /// Groups `X`, at most 65,535.
        groups: u32,
        /// Rows of the largest group, at most 2^20.
        largest: u32,
    }
    => |it| tiles(it.largest, it.outputs, it.groups)
}
