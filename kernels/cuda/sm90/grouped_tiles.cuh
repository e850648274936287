// What the grouped products have in common: shapes of tiles, their order, and the loads of their operands.
//
// Outputs are the rows of a product (left operand: weights), tokens its columns (right operand): for one token and for a
// thousand, so that an output is always the same chain of instructions over the inner dimension.
#pragma once

#include "primitives.cuh"

namespace conclave::sm90 {

/// Most groups of a launch.
constexpr u32 GROUPS = 1024;
/// Outputs (rows of weights) that one warpgroup multiplies.
constexpr u32 WEIGHT_ROWS = 64;
/// Rows that one tile load of activations brings; whole tiles of absent rows are not loaded.
constexpr u32 PIECE = 16;
/// Tokens whose scales one tile load brings.
constexpr u32 SCALE_PIECE = 32;

/// Set in the address of a map of gate and up that has up in the place of gate, and gate in that of up.
constexpr u64 EXCHANGED = 1;

/// The arguments of a grouped product `y [P, outputs] = x [P, inner] · Wᵀ` of each group.
struct Grouped {
    /// bf16 or e4m3 [P, inner], tile [16 rows, 128 bytes]. Heads: bf16 [1, rows, groups, inner], tile [1, 16, 1, 128 bytes]
    const TensorMap* x;
    /// f32 [ceil(inner / 128), P], tile [1, 32]; FP8 only
    const TensorMap* x_scales;
    /// Addresses of tensor maps [groups]: bf16 or e4m3 [outputs, inner], tile [64 rows, 128 bytes]. Gated: gate [outputs, inner]
    /// and up, as [outputs / 8, 2, 8, inner], tile [4, 2, 8, 128 bytes]; it may have EXCHANGED set.
    const u64* weights;
    /// Addresses of f32 [ceil(outputs / 128), ceil(inner / 128)]; gated: of gate, and those of up; FP8 only
    const u64 *scales, *up_scales;
    /// Rows of `x` and `y` that each group owns: begin[g]..end[g]. Without them (null), each has 0..rows.
    const u32* begin;
    const u32* end;
    u32 rows;
    u32 groups, inner, outputs;
    /// Heads: y [rows, groups, width], of which the first outputs are written.
    u32 width = 0;

    __device__ __forceinline__ u32 first(u32 group) const { return begin == nullptr ? 0 : begin[group]; }
    __device__ __forceinline__ u32 last(u32 group) const { return end == nullptr ? rows : end[group]; }
    __device__ __forceinline__ bool exchanged(u32 group) const { return (weights[group] & EXCHANGED) != 0; }
    __device__ __forceinline__ const TensorMap* map(u32 group) const {
        return reinterpret_cast<const TensorMap*>(weights[group] & ~EXCHANGED);
    }
};

/// Sizes that a kernel is compiled for. `Gated`: rows of gate and up by turns of eight, so that a thread holds both of an output.
/// `Heads`: groups are heads, whose inputs and outputs lie side by side in a row.
template <u32 Tokens, u32 Warpgroups, u32 Stages, bool Gated, bool Fp8, bool Heads = false>
struct Shape {
    static constexpr u32 TOKENS = Tokens, WARPGROUPS = Warpgroups, STAGES = Stages;
    static constexpr bool GATED = Gated, FP8 = Fp8, HEADS = Heads;
    static constexpr u32 THREADS = (1 + Warpgroups) * WARPGROUP;
    /// Elements of the inner dimension a stage.
    static constexpr u32 DEPTH = Fp8 ? 128 : 64;
    static constexpr u32 OUTPUTS_EACH = Gated ? WEIGHT_ROWS / 2 : WEIGHT_ROWS;
    static constexpr u32 OUTPUTS = OUTPUTS_EACH * Warpgroups;
    static constexpr u32 WEIGHT_BYTES = WEIGHT_ROWS * ROW;
    static constexpr u32 X_BYTES = Tokens * ROW;
    static constexpr u32 STAGE_BYTES = Warpgroups * WEIGHT_BYTES + X_BYTES;
    static constexpr u32 SCALE_BYTES = Fp8 ? (Tokens < SCALE_PIECE ? SCALE_PIECE : Tokens) * 4 : 0;
    /// Offsets in shared memory: stages, scales of each stage, barriers, running number of tiles.
    static constexpr u32 SCALES_AT = Stages * STAGE_BYTES;
    static constexpr u32 BARRIERS_AT = SCALES_AT + Stages * SCALE_BYTES;
    static constexpr u32 TILES_AT = BARRIERS_AT + 2 * Stages * sizeof(Barrier);
    static constexpr u32 SHARED = TILES_AT + (GROUPS + 1) * 4;
    static_assert(SHARED <= 227 * 1024 && Tokens % PIECE == 0);
};

/// One tile of a product.
struct Tile {
    u32 group;
    /// First row of `x` and `y`, and how many rows there are.
    u32 row, rows;
    /// First output.
    u32 output;
};

/// The shared memory of a block.
template <class S>
struct Memory {
    unsigned char* base;

    __device__ __forceinline__ unsigned char* weights(u32 stage, u32 warpgroup) const {
        return base + stage * S::STAGE_BYTES + warpgroup * S::WEIGHT_BYTES;
    }
    __device__ __forceinline__ unsigned char* x(u32 stage) const { return weights(stage, S::WARPGROUPS); }
    __device__ __forceinline__ float* scales(u32 stage) const {
        return reinterpret_cast<float*>(base + S::SCALES_AT + stage * S::SCALE_BYTES);
    }
    __device__ __forceinline__ Barrier* full(u32 stage) const {
        return reinterpret_cast<Barrier*>(base + S::BARRIERS_AT) + stage;
    }
    __device__ __forceinline__ Barrier* empty(u32 stage) const { return full(S::STAGES + stage); }
    /// Tiles of tokens before each group, and in all [groups + 1]
    __device__ __forceinline__ u32* tiles() const { return reinterpret_cast<u32*>(base + S::TILES_AT); }
};

/// Counts the tiles of tokens of each group; one warp.
template <class S>
__device__ __forceinline__ void count_tiles(const Grouped& grouped, u32* tiles) {
    u32 lane = threadIdx.x % WARP, before = 0;
    for (u32 first = 0; first < grouped.groups; first += WARP) {
        u32 group = first + lane, sum = 0;
        if (group < grouped.groups) sum = ceil_div(grouped.last(group) - grouped.first(group), S::TOKENS);
        for (u32 step = 1; step < WARP; step *= 2) {
            u32 other = __shfl_up_sync(0xffffffff, sum, step);
            if (lane >= step) sum += other;
        }
        if (group < grouped.groups) tiles[group + 1] = before + sum;
        before += __shfl_sync(0xffffffff, sum, 31);
    }
    if (lane == 0) tiles[0] = 0;
}

/// The tile of a number: groups in order, in each all tokens of the first outputs, then of the next, so that weights come from
/// memory once.
template <class S>
__device__ __forceinline__ Tile tile_of(const Grouped& grouped, const u32* tiles, u32 number) {
    u32 columns = ceil_div(grouped.outputs, S::OUTPUTS), group = 0;
    for (u32 last = grouped.groups; last - group > 1;) {
        u32 middle = (group + last) / 2;
        (tiles[middle] * columns <= number ? group : last) = middle;
    }
    u32 here = tiles[group + 1] - tiles[group], rest = number - tiles[group] * columns;
    u32 row = grouped.first(group) + rest % here * S::TOKENS;
    return {group, row, min(grouped.last(group) - row, S::TOKENS), rest / here * S::OUTPUTS};
}

/// Sets up barriers and the count of tiles; all threads. Gives the number of tiles.
template <class S>
__device__ __forceinline__ u32 prepare(const Grouped& grouped, const Memory<S>& memory) {
    if (threadIdx.x < WARP) count_tiles<S>(grouped, memory.tiles());
    if (threadIdx.x == WARP) {
        for (u32 stage = 0; stage < S::STAGES; ++stage) {
            barrier_init(memory.full(stage), 1);
            barrier_init(memory.empty(stage), S::WARPGROUPS * WARPGROUP / WARP);
        }
        barrier_init_fence();
    }
    __syncthreads();
    return memory.tiles()[grouped.groups] * ceil_div(grouped.outputs, S::OUTPUTS);
}

/// Weights are read once where one tile holds all tokens of a group.
template <class S>
constexpr Keep WEIGHTS_KEPT = S::TOKENS <= 64 ? Keep::First : Keep::Normal;

/// Starts the loads of one stage of a tile.
template <class S>
__device__ __forceinline__ void load_stage(
    const Grouped& grouped, const Memory<S>& memory, const Tile& tile, const TensorMap* weights, u32 stage, u32 depth) {
    Barrier* full = memory.full(stage);
    u32 pieces = ceil_div(tile.rows, PIECE), scale_pieces = S::FP8 ? ceil_div(tile.rows, SCALE_PIECE) : 0;
    barrier_expect(full, S::WARPGROUPS * S::WEIGHT_BYTES + pieces * PIECE * ROW + scale_pieces * SCALE_PIECE * 4);
    i32 inner = static_cast<i32>(depth * S::DEPTH), row = static_cast<i32>(tile.row);
    for (u32 warpgroup = 0; warpgroup < S::WARPGROUPS; ++warpgroup) {
        i32 output = static_cast<i32>(tile.output + warpgroup * S::OUTPUTS_EACH);
        if constexpr (S::GATED) {
            tile_load<WEIGHTS_KEPT<S>>(memory.weights(stage, warpgroup), weights, full, inner, 0, 0, output / 8);
        } else {
            tile_load<WEIGHTS_KEPT<S>>(memory.weights(stage, warpgroup), weights, full, inner, output);
        }
    }
    for (u32 piece = 0; piece < pieces; ++piece) {
        unsigned char* to = memory.x(stage) + piece * PIECE * ROW;
        i32 from = row + static_cast<i32>(piece * PIECE);
        if constexpr (S::HEADS) {
            tile_load<Keep::Last>(to, grouped.x, full, inner, static_cast<i32>(tile.group), from, 0);
        } else {
            tile_load<Keep::Last>(to, grouped.x, full, inner, from);
        }
    }
    for (u32 piece = 0; piece < scale_pieces; ++piece) {
        i32 first = row + static_cast<i32>(piece * SCALE_PIECE);
        tile_load<Keep::Last>(memory.scales(stage) + piece * SCALE_PIECE, grouped.x_scales, full, first, static_cast<i32>(depth));
    }
}

/// Loads the operands of all tiles of the block; one thread.
template <class S>
__device__ __forceinline__ void load_tiles(const Grouped& grouped, const Memory<S>& memory, u32 tiles) {
    map_acquire(grouped.x);
    if constexpr (S::FP8) map_acquire(grouped.x_scales);
    Ring ring;
    for (u32 number = blockIdx.x, acquired = ~0u; number < tiles; number += gridDim.x) {
        Tile tile = tile_of<S>(grouped, memory.tiles(), number);
        const TensorMap* weights = grouped.map(tile.group);
        if (tile.group != acquired) map_acquire(weights);
        acquired = tile.group;
        for (u32 depth = 0; depth < ceil_div(grouped.inner, S::DEPTH); ++depth) {
            barrier_wait(memory.empty(ring.stage), ring.parity ^ 1);
            load_stage<S>(grouped, memory, tile, weights, ring.stage, depth);
            ring.next(S::STAGES);
        }
    }
}

/// Where register `i` of a fragment lies: token of the tile.
__device__ __forceinline__ u32 fragment_token(u32 i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

/// Where it lies among the outputs of the tile; gated: among those of gate and of up.
template <class S>
__device__ __forceinline__ u32 fragment_output(u32 warpgroup, u32 i) {
    u32 warp = threadIdx.x % WARPGROUP / WARP, row = threadIdx.x % WARP / 4;
    if constexpr (S::GATED) return warpgroup * S::OUTPUTS_EACH + warp * 8 + row;
    return warpgroup * S::OUTPUTS_EACH + warp * 16 + row + i / 2 % 2 * 8;
}

/// Writes a tile of sums: f32 `y [P, outputs]`.
template <class S>
__device__ __forceinline__ void store_sums(
    const Grouped& grouped, const Tile& tile, u32 warpgroup, const float (&d)[S::TOKENS / 2], float* y) {
#pragma unroll
    for (u32 i = 0; i < S::TOKENS / 2; ++i) {
        u32 token = fragment_token(i), output = tile.output + fragment_output<S>(warpgroup, i);
        if (token < tile.rows && output < grouped.outputs) y[u64(tile.row + token) * grouped.outputs + output] = d[i];
    }
}

/// Writes a tile of `silu(gate) ⊙ up`, rounded: bf16 `y [P, outputs]`. Registers hold gate then up, or (1) up then gate.
template <class S, u32 EXCHANGE>
__device__ __forceinline__ void store_gated(
    const Grouped& grouped, const Tile& tile, u32 warpgroup, const float (&d)[S::TOKENS / 2], u16* y) {
    u32 output = tile.output + fragment_output<S>(warpgroup, 0);
#pragma unroll
    for (u32 i = 0; i < S::TOKENS / 2; i += i % 2 == 0 ? 1 : 3) {
        u32 token = fragment_token(i);
        float gate = d[i + 2 * EXCHANGE], up = d[i + 2 - 2 * EXCHANGE];
        float value = gate * reciprocal(1.0f + power_of_two(gate * -1.44269504f)) * up;
        if (token < tile.rows && output < grouped.outputs) {
            y[u64(tile.row + token) * grouped.outputs + output] = static_cast<u16>(pack_bf16(value, 0.0f));
        }
    }
}

/// Writes a tile of a head's sums, rounded: bf16 `y [rows, groups, width]`.
template <class S>
__device__ __forceinline__ void store_heads(
    const Grouped& grouped, const Tile& tile, u32 warpgroup, const float (&d)[S::TOKENS / 2], u16* y) {
#pragma unroll
    for (u32 i = 0; i < S::TOKENS / 2; ++i) {
        u32 token = fragment_token(i), output = tile.output + fragment_output<S>(warpgroup, i);
        u64 head = u64(tile.row + token) * grouped.groups + tile.group;
        if (token < tile.rows && output < grouped.outputs) {
            y[head * grouped.width + output] = static_cast<u16>(pack_bf16(d[i], 0.0f));
        }
    }
}

/// Writes a tile as its kind asks.
template <class S>
__device__ __forceinline__ void store_tile(
    const Grouped& grouped, const Tile& tile, u32 warpgroup, const float (&d)[S::TOKENS / 2], void* y) {
    if constexpr (S::GATED) {
        if (grouped.exchanged(tile.group)) {
            store_gated<S, 1>(grouped, tile, warpgroup, d, static_cast<u16*>(y));
        } else {
            store_gated<S, 0>(grouped, tile, warpgroup, d, static_cast<u16*>(y));
        }
    } else if constexpr (S::HEADS) {
        store_heads<S>(grouped, tile, warpgroup, d, static_cast<u16*>(y));
    } else {
        store_sums<S>(grouped, tile, warpgroup, d, static_cast<float*>(y));
    }
}

/// Gives a stage back to the loads; each warp for itself, when its own products have read the stage.
template <class S>
__device__ __forceinline__ void release(const Memory<S>& memory, u32 stage) {
    if (threadIdx.x % WARP == 0) barrier_arrive(memory.empty(stage));
}

}  // namespace conclave::sm90
