// The model's own distribution over a row of logits, by a block: what logprobs are computed from.
#pragma once

#include "sample.cuh"

// A row whose distribution is asked for, and how many of its most likely tokens.
struct Scored {
    u32 row, top;
};

// The sum of exp(logit − best), at least 1, or 0 where a logit is not finite; the best logit; that of the row's token.
struct Score {
    double sum;
    float best, logit;
};

// One of the most likely tokens.
struct Likely {
    u32 id;
    float logit;
};

// The sum of weights over the row, in units of the best one's.
__device__ __forceinline__ double sum_weights(const Row& row, const Weights& weights) {
    u64 own = 0, total;
    for_ids(row, [&](u32, float logit) { own += weights.of(logit); });
    sum_before(own, total);
    return static_cast<double>(total) / weights.one;
}

// The `count` best ids, best first; count is at most V and LISTED.
__device__ __forceinline__ void list_best(const Row& row, float best, u32 count, Likely* out) {
    SHARED(Search, search, [1]);
    SHARED(u32, next, [1]);
    u64 last = last_of_count(row, best, search[0], count);
    u64(&keys)[LISTED] = search[0].list.keys;
    if (threadIdx.x == 0) next[0] = 0;
    __syncthreads();
    for_ids(row, [&](u32 id, float logit) {
        u64 key = rank_key(logit, id);
        if (key >= last) keys[atomicAdd(&next[0], 1u)] = key;
    });
    __syncthreads();
    for (u32 at = threadIdx.x; at < count; at += RANK_THREADS) {
        u32 rank = 0;
        for (u32 other = 0; other < count; other++) rank += keys[other] > keys[at];
        out[rank] = {id_of(keys[at]), logit_of(keys[at])};
    }
}

// The score of a row for a token, which may be NO_TOKEN; `out [top]` its most likely ones.
__device__ __forceinline__ Score score_row(const Row& row, u32 token, u32 top, Likely* out) {
    u64 best = best_key(row);
    if (best == BROKEN || token >= row.vocab) return {0.0, 0.0f, 0.0f};
    float highest = logit_of(best);
    Score score{sum_weights(row, Weights(highest, 1.0f, row.vocab)), highest, row.logits[token]};
    if (top > 0) list_best(row, highest, top, out);
    return score;
}
