#include "linear.cuh"

// y [rows, outputs] = x [rows, inner] · Wᵀ. w [outputs, inner]. Grid: (tiles of outputs, tiles of rows).
KERNEL_BOUNDS(linear, (TILE_THREADS), const bf16* x, const bf16* w, float* y, u32 rows, u32 inner, u32 outputs) {
    linear_tile(x, w, y, rows, inner, outputs);
}
