// Products of rows with matrices [out, in], for any sizes.
#pragma once

#include <type_traits>

#include "types.cuh"

// A block computes TILE_ROWS x TILE_OUTPUTS outputs, each one chain of fmaf ascending in the inner dimension. A thread has
// one output of THREAD_ROWS rows.
constexpr u32 TILE_ROWS = 16;
constexpr u32 TILE_OUTPUTS = 64;
constexpr u32 TILE_INNER = 32;
constexpr u32 TILE_THREADS = 256;
constexpr u32 THREAD_ROWS = TILE_ROWS * TILE_OUTPUTS / TILE_THREADS;

// Which outputs a block computes: those of `rows` and `outputs` that lie in the tile that begins at the first ones.
struct Tile {
    u32 first_row, rows, first_output, outputs, inner;
};

// For matrices without scales.
struct Unscaled {};

// Of a product in FP8: a scale for each row and `width` steps of the inner dimension, and for each block of `height` outputs
// and as many steps. The chain of the steps of a block is multiplied by both; these products are one more chain.
struct BlockScales {
    const float* rows;     // [ceil(inner / width), pitch]
    const float* weights;  // [ceil(outputs / height), ceil(inner / width)]
    u32 pitch, height, width, blocks;

    __device__ __forceinline__ BlockScales(const float* rows, const float* weights, u32 pitch, u32 height, u32 width,
                                           u32 inner)
        : rows(rows), weights(weights), pitch(pitch), height(height), width(width), blocks(ceil_div(inner, width)) {}

    __device__ __forceinline__ float of(u32 row, u32 output, u32 block) const {
        return rows[u64{block} * pitch + row] * weights[u64{output / height} * blocks + block];
    }
};

template <class LoadX, class LoadW>
__device__ __forceinline__ void load_tile(const Tile& tile, u32 step, float (*x)[TILE_INNER + 1],
                                          float (*w)[TILE_INNER + 1], LoadX load_x, LoadW load_w) {
    u32 column = threadIdx.x % TILE_INNER, k = step + column;
    for (u32 at = threadIdx.x / TILE_INNER; at < TILE_ROWS + TILE_OUTPUTS; at += TILE_THREADS / TILE_INNER) {
        u32 row = tile.first_row + at, output = tile.first_output + at - TILE_ROWS;
        if (at < TILE_ROWS) x[at][column] = row < tile.rows && k < tile.inner ? load_x(row, k) : 0.0f;
        else w[at - TILE_ROWS][column] = output < tile.outputs && k < tile.inner ? load_w(output, k) : 0.0f;
    }
}

// Computes a tile. `load_x(row, k)` and `load_w(output, k)` are asked only for what exists; `store(row, output, sum)` takes
// results.
template <class LoadX, class LoadW, class Scale, class Store>
__device__ __forceinline__ void product_tile(const Tile& tile, LoadX load_x, LoadW load_w, Scale scale, Store store) {
    constexpr bool SCALES = !std::is_same_v<Scale, Unscaled>;
    SHARED(float, x, [TILE_ROWS][TILE_INNER + 1]);
    SHARED(float, w, [TILE_OUTPUTS][TILE_INNER + 1]);
    u32 first = threadIdx.x / TILE_OUTPUTS * THREAD_ROWS, column = threadIdx.x % TILE_OUTPUTS;
    u32 output = tile.first_output + column;
    bool used = tile.first_row + first < tile.rows && output < tile.outputs;
    float sums[THREAD_ROWS] = {}, scaled[THREAD_ROWS] = {};
    u32 block = 0, left = 0;
    if constexpr (SCALES) left = scale.width;
    for (u32 step = 0; step < tile.inner; step += TILE_INNER) {
        load_tile(tile, step, x, w, load_x, load_w);
        __syncthreads();
        u32 count = used ? min(TILE_INNER, tile.inner - step) : 0;
        for (u32 k = 0; k < count; k++) {
            float weight = w[column][k];
            for (u32 row = 0; row < THREAD_ROWS; row++) sums[row] = fmaf(x[first + row][k], weight, sums[row]);
            if constexpr (SCALES) {
                if (--left > 0 && step + k + 1 < tile.inner) continue;
                for (u32 row = 0; row < THREAD_ROWS; row++) {
                    u32 present = min(tile.first_row + first + row, tile.rows - 1);
                    scaled[row] = fmaf(scale.of(present, output, block), sums[row], scaled[row]);
                    sums[row] = 0.0f;
                }
                block++;
                left = scale.width;
            }
        }
        __syncthreads();
    }
    for (u32 row = 0; row < THREAD_ROWS; row++) {
        if (!used || tile.first_row + first + row >= tile.rows) continue;
        store(tile.first_row + first + row, output, SCALES ? scaled[row] : sums[row]);
    }
}

// y [rows, outputs] = x [rows, inner] · Wᵀ, w [outputs, inner]: the block's tile of it.
template <class X, class W, class Scale = Unscaled>
__device__ __forceinline__ void linear_tile(const X* x, const W* w, float* y, u32 rows, u32 inner, u32 outputs,
                                            Scale scale = {}) {
    Tile tile{blockIdx.y * TILE_ROWS, rows, blockIdx.x * TILE_OUTPUTS, outputs, inner};
    product_tile(
        tile, [=](u32 row, u32 k) { return to_float(x[u64{row} * inner + k]); },
        [=](u32 output, u32 k) { return to_float(w[u64{output} * inner + k]); }, scale,
        [=](u32 row, u32 output, float sum) { y[u64{row} * outputs + output] = sum; });
}
