#include "linear.cuh"

// y [rows, outputs] = x [rows, inner] · Wᵀ. w [outputs, inner]. Grid: (tiles of outputs, tiles of rows).
KERNEL_BOUNDS(linear, (TILE_THREADS), const bf16* x, const bf16* w, float* y, u32 rows, u32 inner, u32 outputs) {
    linear_tile(x, w, y, rows, inner, outputs);
}

// The same in FP8: x with scales [ceil(inner / width), pitch], w with scales [ceil(outputs / height), ceil(inner / width)].
KERNEL_BOUNDS(linear_fp8, (TILE_THREADS), const e4m3* x, const float* x_scales, const e4m3* w, const float* scales, float* y,
              u32 rows, u32 inner, u32 outputs, u32 pitch, u32 height, u32 width) {
    linear_tile(x, w, y, rows, inner, outputs, BlockScales(x_scales, scales, pitch, height, width, inner));
}
