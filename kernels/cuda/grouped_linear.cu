#include "grouped_linear.cuh"

// y [P, outputs] = x [P, inner] · Wᵀ of each row's group. weights [X]: addresses of [outputs, inner]; offsets [X + 1]:
// group g has rows offsets[g]..offsets[g + 1]. Grid: (tiles of outputs, tiles of rows of the largest group, X).
KERNEL_BOUNDS(grouped_linear, (TILE_THREADS), const bf16* x, const bf16* const* weights, const u32* offsets, float* y,
              u32 inner, u32 outputs) {
    grouped_tile(x, weights[blockIdx.z], offsets, y, inner, outputs, Unscaled{});
}

// The same in FP8: x with scales [ceil(inner / width), pitch]; scales [X] are addresses of [ceil(outputs / height),
// ceil(inner / width)], one for each block of weights.
KERNEL_BOUNDS(grouped_linear_fp8, (TILE_THREADS), const e4m3* x, const float* x_scales, const e4m3* const* weights,
              const float* const* scales, const u32* offsets, float* y, u32 inner, u32 outputs, u32 pitch, u32 height,
              u32 width) {
    BlockScales of(x_scales, scales[blockIdx.z], pitch, height, width, inner);
    grouped_tile(x, weights[blockIdx.z], offsets, y, inner, outputs, of);
}
