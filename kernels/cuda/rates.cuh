// What a chip gives at most: reads of its memory, and multiply-adds from registers.
#pragma once

#include "types.cuh"

constexpr u32 RATE_THREADS = 256;
// Reads of 16 bytes that a thread has under way, and chains of multiply-adds.
constexpr u32 READS = 4, CHAINS = 16;

__device__ __forceinline__ u32 folded(uint4 value) { return value.x ^ value.y ^ value.z ^ value.w; }

// This thread's part of x [n]: each READS reads lie a grid apart. Gives the sum of what was read, so that none is left out.
__device__ __forceinline__ u32 read_all(const uint4* x, u64 n) {
    u64 step = u64{gridDim.x} * RATE_THREADS, at = u64{blockIdx.x} * RATE_THREADS + threadIdx.x;
    u32 sum = 0;
    for (; at + (READS - 1) * step < n; at += READS * step) {
#pragma unroll
        for (u32 read = 0; read < READS; read++) sum += folded(x[at + read * step]);
    }
    for (; at < n; at += step) sum += folded(x[at]);
    return sum;
}

// `rounds` multiply-adds of each of CHAINS chains.
__device__ __forceinline__ float add_products(u32 rounds) {
    float sums[CHAINS], factor = 1.0f - 1e-7f * threadIdx.x;
#pragma unroll
    for (u32 chain = 0; chain < CHAINS; chain++) sums[chain] = 1e-3f * chain;
    for (u32 round = 0; round < rounds; round++) {
#pragma unroll
        for (u32 chain = 0; chain < CHAINS; chain++) sums[chain] = fmaf(sums[chain], factor, 1e-3f);
    }
#pragma unroll
    for (u32 chain = 1; chain < CHAINS; chain++) sums[0] += sums[chain];
    return sums[0];
}
