// Attention over expanded keys and values on sm_90a: the rows of one sequence over a chunk of its keys.
//
// A block has 128 rows of queries of one head, 64 for each of two warpgroups; a third loads. Keys come page by page of 64: what
// has no position from the expanded ones, their roped rest from the cache, where all heads share it. Each warpgroup makes scores
// and weights of its rows and sums values in registers: while one weighs, the other multiplies. Scores stay f32; weights are
// rounded to bf16, and it is the rounded ones that are summed.
#pragma once

#include "softmax.cuh"

namespace conclave::sm90::expanded {

/// Positions of a page; elements of a query and key without position, of their roped rest, of a value; of a cached latent.
constexpr u32 PAGE = 64, NOPE = 128, ROPE = 64, VALUE = 128, LATENT = 512;
/// Rows of queries of a warpgroup, and warpgroups that multiply.
constexpr u32 QUERIES = 64, CONSUMERS = 2;
/// Columns of 64 elements that operands are loaded in, and bytes of each.
constexpr u32 KEY_COLUMNS = (NOPE + ROPE) / 64, VALUE_COLUMNS = VALUE / 64, COLUMN_BYTES = 64 * ROW;
constexpr u32 STAGES = 4, STAGE_COLUMNS = KEY_COLUMNS + VALUE_COLUMNS;
/// Registers of a product [64, 128].
constexpr u32 SUMS = 64;

struct Attention {
    /// bf16 [heads · rows, 192], tile [64, 64]: queries head by head, roped
    const TensorMap* q;
    /// bf16 [keys, heads · 256], tile [64, 64]: of each head 128 elements of the key, then the value; zeros behind the last key
    const TensorMap* kv;
    /// bf16 [slots, 576], tile [64, 64]
    const TensorMap* cache;
    /// Cache blocks of the chunk's keys
    const u32* blocks;
    /// [rows, heads, 2 + 128]: largest score, sum of weights, values summed by weight
    float* sums;
    /// Position of the first row, that of the first key (a multiple of 64), and keys of the chunk.
    u32 position, first, count;
    u32 rows, heads;
    /// Whether the sums begin anew.
    bool fresh;
    float scale;

    /// Keys of the chunk that a row sees.
    __device__ __forceinline__ u32 seen(u32 row) const {
        u32 end = position + row + 1;
        return row < rows && end > first ? min(end - first, count) : 0;
    }
};

/// Shared memory of a block.
struct Memory {
    unsigned char* base;

    static constexpr u32 STAGES_AT = CONSUMERS * KEY_COLUMNS * COLUMN_BYTES;
    static constexpr u32 BARRIERS_AT = STAGES_AT + STAGES * STAGE_COLUMNS * COLUMN_BYTES;
    static constexpr u32 SHARED = BARRIERS_AT + (1 + 2 * STAGES) * sizeof(Barrier);
    static_assert(SHARED <= 227 * 1024);

    __device__ __forceinline__ unsigned char* q(u32 consumer, u32 column) const {
        return base + (consumer * KEY_COLUMNS + column) * COLUMN_BYTES;
    }
    /// Columns of keys, then of values.
    __device__ __forceinline__ unsigned char* page(u32 stage, u32 column) const {
        return base + STAGES_AT + (stage * STAGE_COLUMNS + column) * COLUMN_BYTES;
    }
    __device__ __forceinline__ Barrier* barrier(u32 at) const { return reinterpret_cast<Barrier*>(base + BARRIERS_AT) + at; }
    __device__ __forceinline__ Barrier* q_full() const { return barrier(0); }
    __device__ __forceinline__ Barrier* full(u32 stage) const { return barrier(1 + stage); }
    __device__ __forceinline__ Barrier* empty(u32 stage) const { return barrier(1 + STAGES + stage); }
};

/// What a block works on.
struct Item {
    u32 head, row, pages;

    /// Later rows see more: they begin first.
    __device__ __forceinline__ explicit Item(const Attention& it) : head(blockIdx.y) {
        row = (gridDim.x - 1 - blockIdx.x) * CONSUMERS * QUERIES;
        pages = ceil_div(it.seen(min(row + CONSUMERS * QUERIES, it.rows) - 1), PAGE);
    }
};

__device__ __forceinline__ void prepare(const Memory& memory) {
    if (threadIdx.x == 0) {
        barrier_init(memory.q_full(), 1);
        for (u32 stage = 0; stage < STAGES; ++stage) {
            barrier_init(memory.full(stage), 1);
            barrier_init(memory.empty(stage), CONSUMERS * WARPGROUP / WARP);
        }
        barrier_init_fence();
    }
    __syncthreads();
}

/// Loads queries, then pages; one thread.
__device__ __forceinline__ void load(const Attention& it, const Memory& memory, const Item& item) {
    map_acquire(it.q);
    map_acquire(it.kv);
    map_acquire(it.cache);
    barrier_expect(memory.q_full(), CONSUMERS * KEY_COLUMNS * COLUMN_BYTES);
    for (u32 at = 0; at < CONSUMERS * KEY_COLUMNS; ++at) {
        u32 consumer = at / KEY_COLUMNS, column = at % KEY_COLUMNS, row = item.head * it.rows + item.row + consumer * QUERIES;
        tile_load(memory.q(consumer, column), it.q, memory.q_full(), static_cast<i32>(column * 64), static_cast<i32>(row));
    }
    Ring ring;
    for (u32 page = 0; page < item.pages; ++page, ring.next(STAGES)) {
        Barrier* full = memory.full(ring.stage);
        barrier_wait(memory.empty(ring.stage), ring.parity ^ 1);
        barrier_expect(full, STAGE_COLUMNS * COLUMN_BYTES);
        for (u32 column = 0; column < STAGE_COLUMNS; ++column) {
            unsigned char* to = memory.page(ring.stage, column);
            if (column == NOPE / 64) {
                tile_load(to, it.cache, full, static_cast<i32>(LATENT), static_cast<i32>(it.blocks[page] * PAGE));
            } else {
                u32 element = item.head * (NOPE + VALUE) + (column < NOPE / 64 ? column : column - ROPE / 64) * 64;
                tile_load(to, it.kv, full, static_cast<i32>(element), static_cast<i32>(page * PAGE));
            }
        }
    }
}

/// A thread's two rows: which of the sequence's they are, the keys that they see, and what they have so far.
struct Rows {
    u32 row[2], seen[2];
    Softmax softmax;
    float sums[SUMS];

    __device__ __forceinline__ float* so_far(const Attention& it, u32 head, u32 half) const {
        return it.sums + (u64{row[half]} * it.heads + head) * (2 + VALUE);
    }

    __device__ __forceinline__ Rows(const Attention& it, const Item& item) : sums{} {
        u32 consumer = threadIdx.x / WARPGROUP - 1, first = item.row + consumer * QUERIES;
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            row[half] = first + threadIdx.x % WARPGROUP / WARP * 16 + threadIdx.x % WARP / 4 + half * 8;
            seen[half] = it.seen(row[half]);
            if (it.fresh || row[half] >= it.rows) continue;
            const float* from = so_far(it, item.head, half);
            softmax.max[half] = from[0];
            // The sum is over four lanes.
            softmax.sum[half] = threadIdx.x % 4 == 0 ? from[1] : 0.0f;
            const float2* pairs = reinterpret_cast<const float2*>(from + 2 + threadIdx.x % 4 * 2);
#pragma unroll
            for (u32 i = 0; i < SUMS; i += 4) {
                float2 pair = pairs[i];
                sums[i + 2 * half] = pair.x;
                sums[i + 2 * half + 1] = pair.y;
            }
        }
    }

    __device__ __forceinline__ void store(const Attention& it, const Item& item) const {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            float sum = softmax.sum[half];
            sum += __shfl_xor_sync(0xffffffff, sum, 1);
            sum += __shfl_xor_sync(0xffffffff, sum, 2);
            if (row[half] >= it.rows) continue;
            float* to = so_far(it, item.head, half);
            if (threadIdx.x % 4 == 0) *reinterpret_cast<float2*>(to) = make_float2(softmax.max[half], sum);
            float2* pairs = reinterpret_cast<float2*>(to + 2 + threadIdx.x % 4 * 2);
#pragma unroll
            for (u32 i = 0; i < SUMS; i += 4) pairs[i] = make_float2(sums[i + 2 * half], sums[i + 2 * half + 1]);
        }
    }
};

/// Adds one page to a warpgroup's rows.
__device__ __forceinline__ void add_page(
    const Memory& memory, const Ring& ring, u64 q, u32 page, float scale, Rows& rows) {
    float s[SCORES], factors[2];
    u32 weights[4][4];
    barrier_wait(memory.full(ring.stage), ring.parity);
    product_fence();
    u64 keys = operand(memory.page(ring.stage, 0));
#pragma unroll
    for (u32 column = 0; column < KEY_COLUMNS; ++column) {
#pragma unroll
        for (u32 step = 0; step < ROW / STEP; ++step) {
            u32 at = column * COLUMN_BYTES + step * STEP;
            product_bf16<PAGE>(s, advance(q, at), advance(keys, at), column > 0 || step > 0);
        }
    }
    product_commit();
    product_wait<0>();
    product_pin(s);
    mask(rows.seen, page * PAGE, s);
    weigh(s, scale * LOG2_E, rows.softmax, weights, factors);
    rescale(factors, rows.sums);
    product_fence();
    u64 values = operand_columns(memory.page(ring.stage, KEY_COLUMNS), COLUMN_BYTES);
#pragma unroll
    for (u32 step = 0; step < 4; ++step) {
        product_bf16_registers<VALUE>(rows.sums, weights[step], advance(values, step * 16 * ROW), true);
    }
    product_commit();
    product_wait<0>();
    product_pin(rows.sums);
    arrive_warp(memory.empty(ring.stage));
}

__device__ __forceinline__ void attend(const Attention& it) {
    Memory memory{dynamic_shared()};
    Item item(it);
    prepare(memory);
    if (threadIdx.x < WARPGROUP) {
        if (threadIdx.x == 0) load(it, memory, item);
        return;
    }
    Rows rows(it, item);
    u64 q = operand(memory.q(threadIdx.x / WARPGROUP - 1, 0));
    barrier_wait(memory.q_full(), 0);
    Ring ring;
    for (u32 page = 0; page < item.pages; ++page, ring.next(STAGES)) add_page(memory, ring, q, page, it.scale, rows);
    rows.store(it, item);
}

}  // namespace conclave::sm90::expanded
