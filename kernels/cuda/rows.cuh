// Rows of f32: taken from tables, gathered, normed, combined. A block has one row, blockIdx.x.
#pragma once

#include "math.cuh"

constexpr u32 ROW_THREADS = 256;

// Calls `operation(i)` for each i below n that this thread has of the row.
template <class Operation>
__device__ __forceinline__ void for_row(u32 n, Operation operation) {
    for (u32 i = threadIdx.x; i < n; i += ROW_THREADS) operation(i);
}

// 1 / sqrt(mean(x²) + eps) of x [n]. A thread adds up elements i, i + 256, …; then threads are added pairwise.
__device__ __forceinline__ float norm_factor(const float* x, u32 n, float eps) {
    float squares = 0.0f;
    for_row(n, [&](u32 i) { squares = fmaf(x[i], x[i], squares); });
    return 1.0f / sqrtf(block_sum(squares) / static_cast<float>(n) + eps);
}

// Rotates the pair (2i, 2i + 1) of x by the angle of pair i.
__device__ __forceinline__ float2 rotated(const float* x, const float* cos, const float* sin, u32 i) {
    float even = x[2 * i], odd = x[2 * i + 1];
    return make_float2(even * cos[i] - odd * sin[i], odd * cos[i] + even * sin[i]);
}
