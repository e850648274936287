// Functions that kernels share. They are made of IEEE operations in a fixed order, so that a GPU and the shim give the
// same bits.
#pragma once

#include "types.cuh"

// e to the power of x, within two units in the last place; 0 and infinity where that is out of range, NaN of NaN.
__device__ __forceinline__ float exp_f32(float x) {
    if (!(x > -104.0f)) return x != x ? x : 0.0f;
    if (x > 89.0f) return INFINITY;
    // x = n ln 2 + rest, with ln 2 in two parts.
    float n = rintf(x * 1.44269504f);
    float rest = fmaf(n, -0.693145752f, x);
    rest = fmaf(n, -1.42860677e-6f, rest);
    float sum = 1.0f / 5040.0f;
    sum = fmaf(sum, rest, 1.0f / 720.0f);
    sum = fmaf(sum, rest, 1.0f / 120.0f);
    sum = fmaf(sum, rest, 1.0f / 24.0f);
    sum = fmaf(sum, rest, 1.0f / 6.0f);
    sum = fmaf(sum, rest, 0.5f);
    sum = fmaf(sum, rest, 1.0f);
    sum = fmaf(sum, rest, 1.0f);
    // Two factors, as 2^n alone may be out of range.
    int half = static_cast<int>(n) / 2, other = static_cast<int>(n) - half;
    float power = __uint_as_float(static_cast<u32>(half + 127) << 23);
    return sum * power * __uint_as_float(static_cast<u32>(other + 127) << 23);
}

// e to the power of x in double precision, within two units in the last place, for x from −700 to 0.
__device__ __forceinline__ double exp_f64(double x) {
    // x = n ln 2 + rest, with ln 2 in two parts.
    double n = rint(x * 1.4426950408889634);
    double rest = fma(n, -6.93147180369123816490e-01, x);
    rest = fma(n, -1.90821492927058770002e-10, rest);
    double sum = 1.0 / 479001600.0;
    sum = fma(sum, rest, 1.0 / 39916800.0);
    sum = fma(sum, rest, 1.0 / 3628800.0);
    sum = fma(sum, rest, 1.0 / 362880.0);
    sum = fma(sum, rest, 1.0 / 40320.0);
    sum = fma(sum, rest, 1.0 / 5040.0);
    sum = fma(sum, rest, 1.0 / 720.0);
    sum = fma(sum, rest, 1.0 / 120.0);
    sum = fma(sum, rest, 1.0 / 24.0);
    sum = fma(sum, rest, 1.0 / 6.0);
    sum = fma(sum, rest, 0.5);
    sum = fma(sum, rest, 1.0);
    sum = fma(sum, rest, 1.0);
    return sum * __longlong_as_double((static_cast<long long>(n) + 1023) << 52);
}

// silu(gate) · up with silu(x) = x / (1 + exp(−x))
__device__ __forceinline__ float silu_times(float gate, float up) { return gate / (1.0f + exp_f32(-gate)) * up; }

// The sum over the lanes of a warp, pairwise; all lanes get it.
__device__ __forceinline__ float warp_sum(float value) {
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffff, value, lanes);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
    for (int lanes = 16; lanes > 0; lanes /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, lanes));
    return value;
}

// The sum over a block of up to 1024 threads in whole warps, blockDim.x of them: within warps, then over the warps.
// All threads get it. No thread may be ahead by a second call: it begins with a barrier.
__device__ __forceinline__ float block_sum(float value) {
    SHARED(float, sums, [32]);
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    u32 lane = threadIdx.x % 32;
    return warp_sum(lane < blockDim.x / 32 ? sums[lane] : 0.0f);
}
