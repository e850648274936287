// The logits of a row, ranked and weighed by a block.
//
// Ids are ranked by a key of 64 bits: the higher logit, then the lower id. A weight is the share of the probability, not
// normalised, the best one's being 1: an integer in units that no sum over a row overflows. So sums are exact, in whatever
// order they are added, and an exponential is all that rounds.
#pragma once

#include "math.cuh"

constexpr u32 RANK_THREADS = 512, RANK_WARPS = RANK_THREADS / 32;
constexpr u32 NO_TOKEN = 0xffffffff;
// Ids that a block takes at once: four a thread. Of a row at most so many times as there are threads.
constexpr u32 TILE = RANK_THREADS * 4;
// Tiles that are loaded before the first of them is looked at.
constexpr u32 AHEAD = 4;
// Of a key where a logit is not finite. No other key is as high.
constexpr u64 BROKEN = ~u64{0};

// A row: logits [V], and bits of the ids that may be drawn [ceil(V / 32)], or null.
struct Row {
    const float* logits;
    const u32* allowed;
    u32 vocab;
};

// Four neighbouring logits; bits of those that are there, and of those that may be drawn.
struct Four {
    u32 first;
    float logits[4];
    u32 there, allowed;
};

__device__ __forceinline__ Four load_four(const Row& row, u32 first) {
    Four four{first, {}, 0, 0};
    if (first >= row.vocab) return four;
    four.there = row.vocab - first < 4 ? (1u << (row.vocab - first)) - 1 : 15;
    if (row.vocab % 4 == 0) {
        float4 x = *reinterpret_cast<const float4*>(row.logits + first);
        four.logits[0] = x.x, four.logits[1] = x.y, four.logits[2] = x.z, four.logits[3] = x.w;
    } else {
        for (u32 i = 0; i < 4; i++) four.logits[i] = four.there >> i & 1 ? row.logits[first + i] : 0.0f;
    }
    four.allowed = four.there & (row.allowed == nullptr ? 15 : row.allowed[first / 32] >> first % 32);
    return four;
}

// visit(tile, four) for each tile of the row, ascending; all threads come along, those behind the end with nothing.
template <class Visit>
__device__ __forceinline__ void for_tiles(const Row& row, Visit visit) {
    u32 tiles = ceil_div(row.vocab, TILE);
    for (u32 tile = 0; tile < tiles; tile += AHEAD) {
        Four fours[AHEAD];
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) fours[i] = load_four(row, (tile + i) * TILE + threadIdx.x * 4);
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) {
            if (tile + i < tiles) visit(tile + i, fours[i]);
        }
    }
}

// visit(id, logit) for each id of four that may be drawn.
template <class Visit>
__device__ __forceinline__ void for_allowed(const Four& four, Visit visit) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        if (four.allowed >> i & 1) visit(four.first + i, four.logits[i]);
    }
}

// The same over the row.
template <class Visit>
__device__ __forceinline__ void for_ids(const Row& row, Visit visit) {
    for_tiles(row, [&](u32, const Four& four) { for_allowed(four, visit); });
}

// The place of an id: larger is better.
__device__ __forceinline__ u64 rank_key(float logit, u32 id) {
    u32 bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);
    u32 ordered = bits >> 31 ? ~bits : bits | 0x80000000;
    return u64{ordered} << 32 | (0xffffffff - id);
}

__device__ __forceinline__ u32 id_of(u64 key) { return 0xffffffff - static_cast<u32>(key); }

__device__ __forceinline__ float logit_of(u64 key) {
    u32 ordered = static_cast<u32>(key >> 32);
    return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffff : ~ordered);
}

// How logits of a row become weights: exp((logit − best) / temperature) in units of 1 / one.
struct Weights {
    float best;
    double inverse, one;

    __device__ __forceinline__ Weights(float best, float temperature, u32 vocab) : best(best), inverse(1.0 / temperature) {
        u32 bits = 0;
        while (bits < 32 && u64{1} << bits < vocab) bits++;
        one = static_cast<double>(u64{1} << min(63 - bits, 52u));
    }

    __device__ __forceinline__ u64 of(float logit) const {
        double distance = (static_cast<double>(logit) - best) * inverse;
        // Less than half a unit, by far.
        if (distance < -40.0) return 0;
        return static_cast<u64>(exp_f64(distance) * one + 0.5);
    }
};

__device__ __forceinline__ u64 warp_sum(u64 value) {
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffff, value, lanes);
    return value;
}

// The sum over the threads before this one, and in `total` over all. Begins and ends with a barrier.
__device__ __forceinline__ u64 sum_before(u64 value, u64& total) {
    SHARED(u64, warps, [RANK_WARPS]);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 sum = value;
    for (u32 lanes = 1; lanes < 32; lanes *= 2) {
        u64 below = __shfl_up_sync(0xffffffff, sum, lanes);
        if (lane >= lanes) sum += below;
    }
    __syncthreads();
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    u64 before = 0;
    total = 0;
    for (u32 at = 0; at < RANK_WARPS; at++) {
        if (at < warp) before += warps[at];
        total += warps[at];
    }
    return before + sum - value;
}

// The best key of the ids that may be drawn: 0 where there is none, BROKEN where a logit of the row is not finite.
__device__ __forceinline__ u64 best_key(const Row& row) {
    SHARED(u64, warps, [RANK_WARPS]);
    u64 best = 0;
    for_tiles(row, [&](u32, const Four& four) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            if (four.there >> i & 1 && !(fabsf(four.logits[i]) < INFINITY)) best = BROKEN;
        }
        for_allowed(four, [&](u32 id, float logit) { best = max(best, rank_key(logit, id)); });
    });
    for (int lanes = 16; lanes > 0; lanes /= 2) best = max(best, __shfl_xor_sync(0xffffffff, best, lanes));
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
    __syncthreads();
    for (u32 warp = 0; warp < RANK_WARPS; warp++) best = max(best, warps[warp]);
    return best;
}
