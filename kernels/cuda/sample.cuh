// One draw from a row of logits, by a block: temperature, top-k, top-p, min-p, in this order.
//
// Candidates are ranked by a key of 64 bits: the higher logit, then the lower id. What a rule keeps are the keys from some
// threshold on, which is found bit by bit, without sorting. Sums are in double precision and in a fixed order.
#pragma once

#include "math.cuh"

constexpr u32 SAMPLE_THREADS = 512;
constexpr u32 NO_TOKEN = 0xffffffff;

// What decides a row's draw.
struct Draw {
    double u;            // in [0, 1)
    float temperature;   // 0: the best
    u32 top_k;           // 0: all
    float top_p;         // in (0, 1]
    float min_p;         // in [0, 1], relative to the best
};

// What changes one logit: whether the token occurred, how often it was generated, and what is added to it.
struct Adjustment {
    u32 row, id;
    u32 occurred;
    u32 generated;
    float bias;
};

// Penalties of a row.
struct Penalties {
    float repetition;   // above 0; 1: none
    float presence;     // taken off once if generated
    float frequency;    // taken off for each time
};

// The logit with penalties, then bias, kept within the range of f32: as unlikely, or as likely, as can be.
__device__ __forceinline__ float adjusted(float logit, const Adjustment& change, const Penalties& penalties) {
    if (change.occurred) logit = logit > 0.0f ? logit / penalties.repetition : logit * penalties.repetition;
    if (change.generated > 0) {
        logit -= penalties.presence + penalties.frequency * static_cast<float>(change.generated);
    }
    constexpr float MOST = 3.40282347e38f;
    return fminf(fmaxf(logit + change.bias, -MOST), MOST);
}

// A row: its logits, and for each the share of the probability, not normalised, the best one's being 1; 0 once it is out.
struct Candidates {
    const float* logits;
    double* weights;
    u32 vocab;
};

// The place of a candidate: larger is better.
__device__ __forceinline__ u64 rank_key(float logit, u32 id) {
    u32 bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);
    u32 ordered = bits >> 31 ? ~bits : bits | 0x80000000;
    return u64{ordered} << 32 | (0xffffffff - id);
}

// The sum over the block's threads, in a fixed order; all get it. Begins and ends with a barrier.
__device__ __forceinline__ double sum_threads(double value) {
    SHARED(double, warps, [SAMPLE_THREADS / 32]);
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffff, value, lanes);
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    double sum = 0.0;
    for (u32 warp = 0; warp < SAMPLE_THREADS / 32; warp++) sum += warps[warp];
    return sum;
}

// The sum of `measure(i)` over the candidates whose key is at least `threshold`.
template <class Measure>
__device__ __forceinline__ double sum_from(const Candidates& row, u64 threshold, Measure measure) {
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < row.vocab; i += SAMPLE_THREADS) {
        if (row.weights[i] > 0.0 && rank_key(row.logits[i], i) >= threshold) sum += measure(i);
    }
    return sum_threads(sum);
}

// Takes out all but the fewest best candidates whose `measure` adds up to `wanted`.
template <class Measure>
__device__ __forceinline__ void keep_best(const Candidates& row, double wanted, Measure measure) {
    u64 threshold = 0;
    for (int bit = 63; bit >= 0; bit--) {
        u64 higher = threshold | u64{1} << bit;
        if (sum_from(row, higher, measure) >= wanted) threshold = higher;
    }
    for (u32 i = threadIdx.x; i < row.vocab; i += SAMPLE_THREADS) {
        if (rank_key(row.logits[i], i) < threshold) row.weights[i] = 0.0;
    }
    __syncthreads();
}

// The best key of the row: 0 where there is no candidate, all ones where a logit is no number.
__device__ __forceinline__ u64 best_key(const Candidates& row, const u32* allowed) {
    SHARED(u64, warps, [SAMPLE_THREADS / 32]);
    u64 best = 0;
    for (u32 i = threadIdx.x; i < row.vocab; i += SAMPLE_THREADS) {
        float logit = row.logits[i];
        bool candidate = (allowed == nullptr || allowed[i / 32] >> i % 32 & 1) && logit != -INFINITY;
        u64 key = rank_key(logit, i);
        if (!(logit < INFINITY)) best = ~u64{0};
        else if (candidate) best = max(best, key);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) best = max(best, __shfl_xor_sync(0xffffffff, best, lanes));
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
    __syncthreads();
    for (u32 warp = 0; warp < SAMPLE_THREADS / 32; warp++) best = max(best, warps[warp]);
    return best;
}

__device__ __forceinline__ void weigh(const Candidates& row, const u32* allowed, float best, float temperature) {
    for (u32 i = threadIdx.x; i < row.vocab; i += SAMPLE_THREADS) {
        bool candidate = allowed == nullptr || allowed[i / 32] >> i % 32 & 1;
        double distance = (static_cast<double>(row.logits[i]) - best) / temperature;
        row.weights[i] = candidate ? exp(distance) : 0.0;
    }
    __syncthreads();
}

// The id at which the running sum of weights, ascending by id, passes the fraction u of all. A thread sums a stretch of ids.
__device__ __forceinline__ u32 walk(const Candidates& row, double u) {
    SHARED(double, stretches, [SAMPLE_THREADS]);
    SHARED(u32, found, [1]);
    u32 length = ceil_div(row.vocab, SAMPLE_THREADS);
    u32 first = min(row.vocab, threadIdx.x * length), end = min(row.vocab, first + length);
    double sum = 0.0;
    for (u32 i = first; i < end; i++) sum += row.weights[i];
    stretches[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0, before = 0.0;
        for (u32 at = 0; at < SAMPLE_THREADS; at++) total += stretches[at];
        double wanted = u * total;
        u32 at = 0;
        while (at + 1 < SAMPLE_THREADS && before + stretches[at] <= wanted) before += stretches[at++];
        u32 last = NO_TOKEN;
        for (u32 i = min(row.vocab, at * length); i < row.vocab; i++) {
            if (row.weights[i] == 0.0) continue;
            last = i;
            before += row.weights[i];
            if (before > wanted) break;
        }
        found[0] = last;
    }
    __syncthreads();
    return found[0];
}

// The token of a row; NO_TOKEN where a logit is no number or nothing may be drawn. allowed [ceil(V / 32)]: bits of the ids
// that may be drawn, or null; a logit of −∞ may not be drawn either.
__device__ __forceinline__ u32 sample_row(const Candidates& row, const u32* allowed, const Draw& draw) {
    u64 best = best_key(row, allowed);
    if (best == 0 || best == ~u64{0}) return NO_TOKEN;
    u32 id = 0xffffffff - static_cast<u32>(best);
    if (draw.temperature == 0.0f) return id;
    weigh(row, allowed, row.logits[id], draw.temperature);
    auto weight = [&](u32 i) { return row.weights[i]; };
    if (draw.top_k > 0 && draw.top_k < row.vocab) keep_best(row, draw.top_k, [](u32) { return 1.0; });
    if (draw.top_p < 1.0f) keep_best(row, draw.top_p * sum_from(row, 0, weight), weight);
    for (u32 i = threadIdx.x; i < row.vocab; i += SAMPLE_THREADS) {
        if (row.weights[i] < static_cast<double>(draw.min_p)) row.weights[i] = 0.0;
    }
    __syncthreads();
    return walk(row, draw.u);
}
