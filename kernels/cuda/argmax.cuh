// The best of a row.
#pragma once

#include "math.cuh"

constexpr u32 ARGMAX_THREADS = 256;
constexpr u32 NO_TOKEN = 0xffffffff;

struct Best {
    float value;
    u32 id;
};

// The higher value, then the lower id.
__device__ __forceinline__ Best better(Best a, Best b) {
    return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

__device__ __forceinline__ Best warp_best(Best best) {
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        Best other{__shfl_xor_sync(0xffffffff, best.value, lanes), __shfl_xor_sync(0xffffffff, best.id, lanes)};
        best = better(best, other);
    }
    return best;
}

// Of x [n], by a block; all its threads get it. The id is NO_TOKEN if one of them is not finite.
__device__ __forceinline__ Best best_of_row(const float* x, u32 n) {
    SHARED(Best, warps, [ARGMAX_THREADS / 32]);
    Best best{-INFINITY, NO_TOKEN};
    for (u32 i = threadIdx.x; i < n; i += ARGMAX_THREADS) {
        // Nothing is better than infinity: what is not finite wins.
        bool finite = fabsf(x[i]) < INFINITY;
        best = better(best, finite ? Best{x[i], i} : Best{INFINITY, 0});
    }
    best = warp_best(best);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
    __syncthreads();
    for (u32 warp = 0; warp < ARGMAX_THREADS / 32; warp++) best = better(best, warps[warp]);
    if (best.value == INFINITY) best.id = NO_TOKEN;
    return best;
}
