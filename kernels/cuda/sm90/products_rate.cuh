// What the tensor cores give at most: products of tiles that lie in shared memory, and nothing else.
#pragma once

#include "primitives.cuh"

namespace conclave::sm90 {

/// Warpgroups of a block, each with 64 rows of its own and the same columns: the tile of the largest grouped product.
constexpr u32 RATE_WARPGROUPS = 2, RATE_COLUMNS = 256;
constexpr u32 RATE_LEFT = 64 * ROW, RATE_SHARED = RATE_WARPGROUPS * RATE_LEFT + RATE_COLUMNS * ROW;

/// Fills the operands with bf16 numbers of magnitude 1 to 2 and of any sign: zeros would cost less power.
__device__ __forceinline__ void fill_operands(unsigned char* memory) {
    u32* words = reinterpret_cast<u32*>(memory);
    for (u32 at = threadIdx.x; at < RATE_SHARED / 4; at += blockDim.x) {
        u32 bits = (at + 1) * 0x9e3779b9u;
        words[at] = 0x3f803f80u | ((bits ^ bits >> 15) & 0x807f807fu);
    }
    proxy_fence();
    __syncthreads();
}

/// `rounds` times 64 steps of the inner dimension. Gives the sum of a thread's registers.
__device__ __forceinline__ float multiply_rounds(u32 rounds) {
    unsigned char* memory = dynamic_shared();
    fill_operands(memory);
    u64 left = operand(memory + threadIdx.x / WARPGROUP * RATE_LEFT), right = operand(memory + RATE_WARPGROUPS * RATE_LEFT);
    float d[RATE_COLUMNS / 2] = {};
    for (u32 round = 0; round < rounds; ++round) {
        product_fence();
#pragma unroll
        for (u32 step = 0; step < ROW / STEP; ++step) {
            product_bf16<RATE_COLUMNS>(d, advance(left, step * STEP), advance(right, step * STEP), true);
        }
        product_commit();
        product_wait<1>();
    }
    product_wait<0>();
    product_pin(d);
    float sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < RATE_COLUMNS / 2; ++i) sum += d[i];
    return sum;
}

}  // namespace conclave::sm90
