// Absorbed latent attention on sm_90a: the work of a block, its shared memory, and the loads.
//
// An item is up to 64 rows of queries (heads of one row, or several rows of one sequence) and one split of 512 positions.
// Keys come page by page of 64 and stay in shared memory once: all 576 elements as keys, the first 512 as values.
#pragma once

#include "primitives.cuh"

namespace conclave::sm90 {

/// Positions of one page and of one split, pages a split.
constexpr u32 PAGE = 64, SPLIT = 512, PAGES = SPLIT / PAGE;
/// Elements of a value, and of a key with its rotary part.
constexpr u32 LATENT = 512, CACHED = 576;
/// Rows of queries an item has at most.
constexpr u32 QUERIES = 64;
/// Columns of 64 elements that keys and queries are loaded in, and bytes of each.
constexpr u32 COLUMNS = CACHED / 64, COLUMN_BYTES = 64 * ROW;
/// Pages in shared memory at once.
constexpr u32 MLA_STAGES = 2;
/// Columns are given back in three parts: values of the first warpgroup, of the second, and the rotary part.
constexpr u32 PARTS = 3, PART_COLUMNS = 4;

/// One item of work.
struct alignas(16) MlaItem {
    /// First row of `q [T · heads, 576]`, and rows (up to 64, of one sequence, positions ascending).
    u32 first, rows;
    /// Which sequence, and which split of its positions.
    u32 sequence, split;
};

struct Mla {
    /// bf16 [T · heads, 576], tile [64, 64]
    const TensorMap* q;
    /// bf16 [slots, 576], tile [64, 64]
    const TensorMap* cache;
    /// [items]
    const MlaItem* items;
    /// Keys that a row sees: its position + 1 [T]
    const u32* keys;
    /// Where a sequence's blocks begin in `blocks` [sequences]; cache blocks of all sequences
    const u32* first_block;
    const u32* blocks;
    /// [T, heads, splits, 2 + 512]: largest score, sum of weights, weighted latents
    float* out;
    u32 item_count, heads, splits;
    float scale;
};

/// Shared memory of a block.
struct MlaMemory {
    unsigned char* base;

    static constexpr u32 KEYS_AT = COLUMNS * COLUMN_BYTES;
    static constexpr u32 WEIGHTS_AT = KEYS_AT + MLA_STAGES * COLUMNS * COLUMN_BYTES;
    static constexpr u32 FACTORS_AT = WEIGHTS_AT + QUERIES * ROW;
    static constexpr u32 BARRIERS_AT = FACTORS_AT + QUERIES * 4;
    static constexpr u32 BARRIERS = 4 + 2 * MLA_STAGES * PARTS;
    static constexpr u32 SHARED = BARRIERS_AT + BARRIERS * sizeof(Barrier);
    static_assert(SHARED <= 227 * 1024);

    __device__ __forceinline__ unsigned char* q(u32 column) const { return base + column * COLUMN_BYTES; }
    __device__ __forceinline__ unsigned char* keys(u32 stage, u32 column) const {
        return base + KEYS_AT + (stage * COLUMNS + column) * COLUMN_BYTES;
    }
    /// Weights of one page's keys: bf16 [64 queries, 64 keys], swizzled
    __device__ __forceinline__ unsigned char* weights() const { return base + WEIGHTS_AT; }
    /// What the sums so far of each query are multiplied with [64]
    __device__ __forceinline__ float* factors() const { return reinterpret_cast<float*>(base + FACTORS_AT); }
    __device__ __forceinline__ Barrier* barrier(u32 at) const { return reinterpret_cast<Barrier*>(base + BARRIERS_AT) + at; }
    __device__ __forceinline__ Barrier* q_full() const { return barrier(0); }
    __device__ __forceinline__ Barrier* q_empty() const { return barrier(1); }
    __device__ __forceinline__ Barrier* weights_full() const { return barrier(2); }
    __device__ __forceinline__ Barrier* weights_empty() const { return barrier(3); }
    __device__ __forceinline__ Barrier* full(u32 stage, u32 part) const { return barrier(4 + stage * PARTS + part); }
    __device__ __forceinline__ Barrier* empty(u32 stage, u32 part) const { return full(MLA_STAGES + stage, part); }
};

constexpr u32 WARPS = WARPGROUP / WARP;

__device__ __forceinline__ void mla_prepare(const MlaMemory& memory) {
    if (threadIdx.x == 0) {
        barrier_init(memory.q_full(), 1);
        barrier_init(memory.q_empty(), WARPS);
        barrier_init(memory.weights_full(), WARPGROUP);
        barrier_init(memory.weights_empty(), WARPS);
        for (u32 at = 0; at < MLA_STAGES * PARTS; ++at) {
            barrier_init(memory.full(0, at), 1);
            barrier_init(memory.empty(0, at), WARPS);
        }
        barrier_init_fence();
    }
    __syncthreads();
}

/// Keys that the last row of an item sees; no other row of it sees more.
__device__ __forceinline__ u32 most_keys(const Mla& mla, const MlaItem& item) {
    return mla.keys[(item.first + item.rows - 1) / mla.heads];
}

/// The page after the last one of an item.
__device__ __forceinline__ u32 pages_end(const Mla& mla, const MlaItem& item) {
    return min(ceil_div(most_keys(mla, item), PAGE), (item.split + 1) * PAGES);
}

/// Starts the loads of one page.
__device__ __forceinline__ void load_page(const Mla& mla, const MlaMemory& memory, Ring& ring, u32 block) {
    for (u32 part = 0; part < PARTS; ++part) {
        u32 first = part * PART_COLUMNS, last = min(first + PART_COLUMNS, COLUMNS);
        Barrier* full = memory.full(ring.stage, part);
        barrier_wait(memory.empty(ring.stage, part), ring.parity ^ 1);
        barrier_expect(full, (last - first) * COLUMN_BYTES);
        for (u32 column = first; column < last; ++column) {
            tile_load(memory.keys(ring.stage, column), mla.cache, full, static_cast<i32>(column * 64), static_cast<i32>(block * PAGE));
        }
    }
    ring.next(MLA_STAGES);
}

/// Loads queries and keys of all items of the block; one thread.
__device__ __forceinline__ void mla_load(const Mla& mla, const MlaMemory& memory) {
    map_acquire(mla.q);
    map_acquire(mla.cache);
    Ring queries, ring;
    for (u32 at = blockIdx.x; at < mla.item_count; at += gridDim.x, queries.next(1)) {
        MlaItem item = mla.items[at];
        const u32* blocks = mla.blocks + mla.first_block[item.sequence];
        barrier_wait(memory.q_empty(), queries.parity ^ 1);
        barrier_expect(memory.q_full(), COLUMNS * COLUMN_BYTES);
        for (u32 column = 0; column < COLUMNS; ++column) {
            tile_load(memory.q(column), mla.q, memory.q_full(), static_cast<i32>(column * 64), static_cast<i32>(item.first));
        }
        for (u32 page = item.split * PAGES; page < pages_end(mla, item); ++page) load_page(mla, memory, ring, blocks[page]);
    }
}

}  // namespace conclave::sm90
