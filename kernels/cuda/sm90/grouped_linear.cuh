// Grouped product in bf16 with f32 sums.
//
// One producer thread keeps a ring of stages full; each warpgroup multiplies its 64 rows of weights with all tokens of the
// tile. An output is one chain: inner dimension ascending, 16 steps an instruction, one accumulator.
#pragma once

#include "grouped_tiles.cuh"

namespace conclave::sm90 {

/// Multiplies one tile. Gives a stage back when the products after it have begun.
template <class S>
__device__ __forceinline__ void multiply_tile(const Memory<S>& memory, u32 depths, u32 warpgroup, Ring& ring, float (&d)[S::TOKENS / 2]) {
    u32 previous = 0;
    for (u32 depth = 0; depth < depths; ++depth) {
        barrier_wait(memory.full(ring.stage), ring.parity);
        product_fence();
        u64 weights = operand(memory.weights(ring.stage, warpgroup)), x = operand(memory.x(ring.stage));
#pragma unroll
        for (u32 step = 0; step < ROW / STEP; ++step) {
            product_bf16<S::TOKENS>(d, advance(weights, step * STEP), advance(x, step * STEP), depth > 0 || step > 0);
        }
        product_commit();
        if (depth > 0) {
            product_wait<1>();
            release<S>(memory, previous);
        }
        previous = ring.stage;
        ring.next(S::STAGES);
    }
    product_wait<0>();
    product_pin(d);
    release<S>(memory, previous);
}

template <class S>
__device__ __forceinline__ void grouped_linear(const Grouped& grouped, void* y) {
    Memory<S> memory{dynamic_shared()};
    u32 tiles = prepare<S>(grouped, memory);
    if (threadIdx.x < WARPGROUP) {
        if constexpr (S::TOKENS > 128) registers_lower<40>();
        if (threadIdx.x == 0) load_tiles<S>(grouped, memory, tiles);
        return;
    }
    if constexpr (S::TOKENS > 128) registers_raise<232>();
    u32 warpgroup = threadIdx.x / WARPGROUP - 1;
    Ring ring;
    for (u32 number = blockIdx.x; number < tiles; number += gridDim.x) {
        float d[S::TOKENS / 2];
        multiply_tile<S>(memory, ceil_div(grouped.inner, S::DEPTH), warpgroup, ring, d);
        store_tile<S>(grouped, tile_of<S>(grouped, memory.tiles(), number), warpgroup, d, y);
    }
}

}  // namespace conclave::sm90
