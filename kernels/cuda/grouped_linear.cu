#include "grouped_linear.cuh"

// y [P, outputs] = x [P, inner] · Wᵀ of each row's group. weights [X]: addresses of [outputs, inner]; offsets [X + 1]:
// group g has rows offsets[g]..offsets[g + 1]. Grid: (tiles of outputs, tiles of rows of the largest group, X).
KERNEL_BOUNDS(grouped_linear, (TILE_THREADS), const bf16* x, const bf16* const* weights, const u32* offsets, float* y,
              u32 inner, u32 outputs) {
    grouped_tile(x, weights[blockIdx.z], offsets, y, inner, outputs, Unscaled{});
}

// The same with weights in FP8: scales [X] are addresses of [ceil(outputs / 128), ceil(inner / 128)], one for each square
// block of weights. The chain of 128 steps is multiplied by its scale; these products are added in ascending order.
KERNEL_BOUNDS(grouped_linear_fp8, (TILE_THREADS), const bf16* x, const e4m3* const* weights, const float* const* scales,
              const u32* offsets, float* y, u32 inner, u32 outputs) {
    const float* blocks = scales[blockIdx.z];
    u32 width = ceil_div(inner, SCALED);
    auto scale = [=](u32 output, u32 k) { return blocks[u64{output / SCALED} * width + k / SCALED]; };
    grouped_tile(x, weights[blockIdx.z], offsets, y, inner, outputs, scale);
}
