// Grouped product in FP8 e4m3 with scales: weights by blocks of 128 x 128, activations by token and 128 elements.
//
// Sums of 128 elements are taken by the tensor cores, whose sums of e4m3 products keep fewer bits than f32; each is scaled and
// added to the output's f32 sum by one fused multiply-add, inner dimension ascending.
#pragma once

#include "grouped_tiles.cuh"

namespace conclave::sm90 {

/// The scales of a warpgroup's weights along the inner dimension; gated: those of gate and of up, in the order of their rows.
template <class S>
struct WeightScales {
    const float *first, *second;

    __device__ __forceinline__ WeightScales(const Grouped& grouped, const Tile& tile, u32 warpgroup) {
        u32 depths = ceil_div(grouped.inner, S::DEPTH), blocks = ceil_div(grouped.outputs, 128);
        // Outputs of a warpgroup lie in one block. The last tile may reach past the last output, where nothing is stored.
        u32 block = min((tile.output + warpgroup * S::OUTPUTS_EACH) / 128, blocks - 1);
        first = second = reinterpret_cast<const float*>(grouped.scales[tile.group]) + u64(block) * depths;
        if constexpr (S::GATED) {
            second = reinterpret_cast<const float*>(grouped.up_scales[tile.group]) + u64(block) * depths;
            if (grouped.exchanged(tile.group)) {
                const float* of_up = second;
                second = first;
                first = of_up;
            }
        }
    }
};

/// Adds the scaled sums of one stage.
template <class S>
__device__ __forceinline__ void add_scaled(
    const float (&part)[S::TOKENS / 2], const float* tokens, float first, float second, float (&d)[S::TOKENS / 2]) {
#pragma unroll
    for (u32 i = 0; i < S::TOKENS / 2; i += 4) {
        float2 scale = reinterpret_cast<const float2*>(tokens)[fragment_token(i) / 2];
        d[i] = fmaf(part[i], scale.x * first, d[i]);
        d[i + 1] = fmaf(part[i + 1], scale.y * first, d[i + 1]);
        d[i + 2] = fmaf(part[i + 2], scale.x * second, d[i + 2]);
        d[i + 3] = fmaf(part[i + 3], scale.y * second, d[i + 3]);
    }
}

/// Multiplies one tile; `d` begins as zeros.
template <class S>
__device__ __forceinline__ void multiply_scaled(
    const Grouped& grouped, const Memory<S>& memory, const Tile& tile, u32 warpgroup, Ring& ring, float (&d)[S::TOKENS / 2]) {
    WeightScales<S> scales(grouped, tile, warpgroup);
    for (u32 depth = 0; depth < ceil_div(grouped.inner, S::DEPTH); ++depth) {
        float first = scales.first[depth], second = S::GATED ? scales.second[depth] : first;
        float part[S::TOKENS / 2];
        barrier_wait(memory.full(ring.stage), ring.parity);
        product_fence();
        u64 weights = operand(memory.weights(ring.stage, warpgroup)), x = operand(memory.x(ring.stage));
#pragma unroll
        for (u32 step = 0; step < ROW / STEP; ++step) {
            product_e4m3<S::TOKENS>(part, advance(weights, step * STEP), advance(x, step * STEP), step > 0);
        }
        product_commit();
        product_wait<0>();
        product_pin(part);
        add_scaled<S>(part, memory.scales(ring.stage), first, second, d);
        __syncwarp();
        release<S>(memory, ring.stage);
        ring.next(S::STAGES);
    }
}

template <class S>
__device__ __forceinline__ void grouped_linear_fp8(const Grouped& grouped, void* y) {
    Memory<S> memory{dynamic_shared()};
    u32 tiles = prepare<S>(grouped, memory);
    if (threadIdx.x < WARPGROUP) {
        if (threadIdx.x == 0) load_tiles<S>(grouped, memory, tiles);
        return;
    }
    u32 warpgroup = threadIdx.x / WARPGROUP - 1;
    Ring ring;
    for (u32 number = blockIdx.x; number < tiles; number += gridDim.x) {
        Tile tile = tile_of<S>(grouped, memory.tiles(), number);
        float d[S::TOKENS / 2] = {};
        multiply_scaled<S>(grouped, memory, tile, warpgroup, ring, d);
        store_tile<S>(grouped, tile, warpgroup, d, y);
    }
}

}  // namespace conclave::sm90
