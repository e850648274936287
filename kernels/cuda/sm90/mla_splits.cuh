// Absorbed latent attention on sm_90a: scores, weights and sums of one split.
//
// Warpgroup 1 multiplies queries with keys, makes weights of the scores and sums the first 256 latents; warpgroup 2 sums the
// other 256. Scores stay f32; weights are rounded to bf16, and it is the rounded ones that are summed. Pages come in ascending
// order with a running maximum, so a row's result depends on its own keys: a page that it sees nothing of multiplies its
// sums by one and adds zeros.
#pragma once

#include "mla_tiles.cuh"
#include "softmax.cuh"

namespace conclave::sm90 {

/// Registers of a product [64, 256].
constexpr u32 SUMS = 128;

/// A thread's two rows of an item: which they are, and the keys that they see (none where there is no such row).
struct QueryRows {
    u32 row[2], keys[2];

    __device__ __forceinline__ QueryRows(const Mla& mla, const MlaItem& item) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            row[half] = threadIdx.x % WARPGROUP / WARP * 16 + threadIdx.x % WARP / 4 + half * 8;
            keys[half] = row[half] < item.rows ? mla.keys[(item.first + row[half]) / mla.heads] : 0;
        }
    }
};

/// Scores of one page: `s [64, 64] = q [64, 576] · keys [64, 576]ᵀ`, in ascending order of the elements.
__device__ __forceinline__ void multiply_keys(const MlaMemory& memory, const Ring& ring, float (&s)[SCORES]) {
    u64 q = operand(memory.q(0)), keys = operand(memory.keys(ring.stage, 0));
#pragma unroll
    for (u32 column = 0; column < COLUMNS; ++column) {
        if (column % PART_COLUMNS == 0) {
            barrier_wait(memory.full(ring.stage, column / PART_COLUMNS), ring.parity);
            product_fence();
        }
#pragma unroll
        for (u32 step = 0; step < ROW / STEP; ++step) {
            u32 at = column * COLUMN_BYTES + step * STEP;
            product_bf16<PAGE>(s, advance(q, at), advance(keys, at), column > 0 || step > 0);
        }
    }
    product_commit();
    product_wait<0>();
    product_pin(s);
}

/// Hands weights and factors to the other warpgroup.
__device__ __forceinline__ void share_weights(
    const MlaMemory& memory, const QueryRows& rows, const u32 (&weights)[4][4], const float (&factors)[2]) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
#pragma unroll
        for (u32 piece = 0; piece < 8; ++piece) {
            u32 at = swizzled(rows.row[half], piece * 16 + threadIdx.x % 4 * 4);
            *reinterpret_cast<u32*>(memory.weights() + at) = weights[piece / 2][piece % 2 * 2 + half];
        }
        if (threadIdx.x % 4 == 0) memory.factors()[rows.row[half]] = factors[half];
    }
}

/// Zeros the values of the slots from `first` on: what lies there may be anything, and even zero times NaN is NaN.
__device__ __forceinline__ void zero_values(const MlaMemory& memory, u32 stage, u32 first) {
    constexpr u32 PIECES = ROW / 16;
    for (u32 at = threadIdx.x % WARPGROUP; at < (PAGE - first) * PIECES * LATENT / 64; at += WARPGROUP) {
        u32 row = first + at / PIECES % (PAGE - first), column = at / PIECES / (PAGE - first);
        *reinterpret_cast<uint4*>(memory.keys(stage, column) + row * ROW + at % PIECES * 16) = make_uint4(0, 0, 0, 0);
    }
}

/// Where the result of a row begins, or null if its split has no keys.
__device__ __forceinline__ float* result(const Mla& mla, const MlaItem& item, const QueryRows& rows, u32 half) {
    if (rows.keys[half] <= item.split * SPLIT) return nullptr;
    return mla.out + (u64(item.first + rows.row[half]) * mla.splits + item.split) * (2 + LATENT);
}

/// Writes a thread's sums of latents `first..first + 256`.
__device__ __forceinline__ void store_sums(
    const Mla& mla, const MlaItem& item, const QueryRows& rows, u32 first, const float (&sums)[SUMS]) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        float* out = result(mla, item, rows, half);
        if (out == nullptr) continue;
        float2* pairs = reinterpret_cast<float2*>(out + 2 + first + threadIdx.x % 4 * 2);
#pragma unroll
        for (u32 i = 0; i < SUMS; i += 4) pairs[i] = make_float2(sums[i + 2 * half], sums[i + 2 * half + 1]);
    }
}

/// Writes the largest score of each row and the sum of its weights.
__device__ __forceinline__ void store_statistics(const Mla& mla, const MlaItem& item, const QueryRows& rows, const Softmax& softmax) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        float sum = softmax.sum[half];
        sum += __shfl_xor_sync(0xffffffff, sum, 1);
        sum += __shfl_xor_sync(0xffffffff, sum, 2);
        float* out = result(mla, item, rows, half);
        if (out == nullptr || threadIdx.x % 4 != 0) continue;
        *reinterpret_cast<float2*>(out) = make_float2(softmax.max[half] * mla.scale, sum);
    }
}

/// Warpgroup 1, one page: scores, weights, and the first half of the latents.
__device__ __forceinline__ void first_page(
    const Mla& mla, const MlaMemory& memory, const QueryRows& rows, u32 page, u32 most, bool last, Ring& ring, Ring& handed,
    Softmax& softmax, float (&sums)[SUMS]) {
    float s[SCORES], factors[2];
    u32 weights[4][4];
    multiply_keys(memory, ring, s);
    if (last) arrive_warp(memory.q_empty());
    arrive_warp(memory.empty(ring.stage, 2));
    mask(rows.keys, page * PAGE, s);
    weigh(s, mla.scale * LOG2_E, softmax, weights, factors);
    barrier_wait(memory.weights_empty(), handed.parity ^ 1);
    share_weights(memory, rows, weights, factors);
    if (most < (page + 1) * PAGE) zero_values(memory, ring.stage, most - page * PAGE);
    proxy_fence();
    barrier_arrive(memory.weights_full());
    rescale(factors, sums);
    barrier_wait(memory.weights_full(), handed.parity);
    product_fence();
    u64 values = operand_columns(memory.keys(ring.stage, 0), COLUMN_BYTES);
#pragma unroll
    for (u32 step = 0; step < 4; ++step) product_bf16_registers<256>(sums, weights[step], advance(values, step * 16 * ROW), true);
    product_commit();
    product_wait<0>();
    product_pin(sums);
    arrive_warp(memory.empty(ring.stage, 0));
    ring.next(MLA_STAGES);
    handed.next(1);
}

/// Warpgroup 2, one page: the second half of the latents.
__device__ __forceinline__ void second_page(const MlaMemory& memory, const QueryRows& rows, Ring& ring, Ring& handed, float (&sums)[SUMS]) {
    barrier_wait(memory.full(ring.stage, 1), ring.parity);
    barrier_wait(memory.weights_full(), handed.parity);
    float factors[2] = {memory.factors()[rows.row[0]], memory.factors()[rows.row[1]]};
    rescale(factors, sums);
    product_fence();
    u64 values = operand_columns(memory.keys(ring.stage, PART_COLUMNS), COLUMN_BYTES), weights = operand(memory.weights());
#pragma unroll
    for (u32 step = 0; step < 4; ++step) {
        product_bf16_columns<256>(sums, advance(weights, step * STEP), advance(values, step * 16 * ROW), true);
    }
    product_commit();
    product_wait<0>();
    product_pin(sums);
    __syncwarp();
    arrive_warp(memory.empty(ring.stage, 1));
    arrive_warp(memory.weights_empty());
    ring.next(MLA_STAGES);
    handed.next(1);
}

__device__ __forceinline__ void mla_first(const Mla& mla, const MlaMemory& memory) {
    Ring queries, ring, handed;
    for (u32 at = blockIdx.x; at < mla.item_count; at += gridDim.x, queries.next(1)) {
        MlaItem item = mla.items[at];
        QueryRows rows(mla, item);
        Softmax softmax;
        float sums[SUMS] = {};
        u32 most = most_keys(mla, item), end = pages_end(mla, item);
        barrier_wait(memory.q_full(), queries.parity);
        for (u32 page = item.split * PAGES; page < end; ++page) {
            first_page(mla, memory, rows, page, most, page + 1 == end, ring, handed, softmax, sums);
        }
        store_statistics(mla, item, rows, softmax);
        store_sums(mla, item, rows, 0, sums);
    }
}

__device__ __forceinline__ void mla_second(const Mla& mla, const MlaMemory& memory) {
    Ring ring, handed;
    for (u32 at = blockIdx.x; at < mla.item_count; at += gridDim.x) {
        MlaItem item = mla.items[at];
        QueryRows rows(mla, item);
        float sums[SUMS] = {};
        u32 end = pages_end(mla, item);
        for (u32 page = item.split * PAGES; page < end; ++page) second_page(memory, rows, ring, handed, sums);
        store_sums(mla, item, rows, LATENT / 2, sums);
    }
}

__device__ __forceinline__ void mla_splits(const Mla& mla) {
    MlaMemory memory{dynamic_shared()};
    mla_prepare(memory);
    if (threadIdx.x < WARPGROUP) {
        registers_lower<40>();
        if (threadIdx.x == 0) mla_load(mla, memory);
    } else if (threadIdx.x < 2 * WARPGROUP) {
        registers_raise<232>();
        mla_first(mla, memory);
    } else {
        registers_raise<232>();
        mla_second(mla, memory);
    }
}

}  // namespace conclave::sm90
