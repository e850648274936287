// Products of multi-head latent attention, a matrix a head: absorbed queries and values. Head: blockIdx.z.
#pragma once

#include "linear.cuh"
#include "rows.cuh"

// The block's tile of y[t, h, 0..outputs] = w[h] [outputs, inner] · round(x[t, h, 0..inner]), where a head of x has x_width
// elements and one of y has y_width.
__device__ __forceinline__ void head_tile(const float* x, u32 x_width, const bf16* w, float* y, u32 y_width, u32 rows,
                                          u32 inner, u32 outputs) {
    u32 head = blockIdx.z, heads = gridDim.z;
    const bf16* matrix = w + u64{head} * outputs * inner;
    Tile tile{blockIdx.y * TILE_ROWS, rows, blockIdx.x * TILE_OUTPUTS, outputs, inner};
    product_tile(
        tile, [=](u32 row, u32 k) { return round_to_bf16(x[(u64{row} * heads + head) * x_width + k]); },
        [=](u32 output, u32 k) { return to_float(matrix[u64{output} * inner + k]); }, Unscaled{},
        [=](u32 row, u32 output, float sum) { y[(u64{row} * heads + head) * y_width + output] = sum; });
}
