// Products of many matrices at once: rows lie one group after the other, each group has a matrix of its own.
#pragma once

#include "linear.cuh"

// The block's tile of group blockIdx.z, whose rows are offsets[group]..offsets[group + 1].
__device__ __forceinline__ Tile group_tile(const u32* offsets, u32 inner, u32 outputs) {
    u32 first = offsets[blockIdx.z], last = offsets[blockIdx.z + 1];
    return {first + blockIdx.y * TILE_ROWS, last, blockIdx.x * TILE_OUTPUTS, outputs, inner};
}

// y [P, outputs]: each row times its group's matrix [outputs, inner].
template <class X, class W, class Scale>
__device__ __forceinline__ void grouped_tile(const X* x, const W* w, const u32* offsets, float* y, u32 inner,
                                             u32 outputs, Scale scale) {
    Tile tile = group_tile(offsets, inner, outputs);
    if (tile.first_row >= tile.rows) return;
    product_tile(
        tile, [=](u32 row, u32 k) { return to_float(x[u64{row} * inner + k]); },
        [=](u32 output, u32 k) { return to_float(w[u64{output} * inner + k]); }, scale,
        [=](u32 row, u32 output, float sum) { y[u64{row} * outputs + output] = sum; });
}
