// One draw from a row of logits, by a block: temperature, top-k, top-p, min-p, in this order.
#pragma once

#include "best.cuh"

// What decides a draw.
struct Draw {
    double u;            // in [0, 1)
    u32 row, mask;       // of the logits, of the masks
    float temperature;   // 0: the best
    u32 top_k;           // 0: all
    float top_p;         // in (0, 1]
    float min_p;         // in [0, 1], relative to the best
};

// What changes one logit: whether the token occurred, how often it was generated, and what is added to it. `before`: what the
// logit was, kept by adjust_logits for restore_logits.
struct Adjustment {
    u32 row, id;
    u32 occurred;
    u32 generated;
    float bias, before;
};

// Penalties of a row.
struct Penalties {
    float repetition;   // above 0; 1: none
    float presence;     // taken off once if generated
    float frequency;    // taken off for each time
};

// The logit with penalties, then bias, kept within the range of f32: as unlikely, or as likely, as can be. What is not finite
// stays so.
__device__ __forceinline__ float adjusted(float logit, const Adjustment& change, const Penalties& penalties) {
    if (!(fabsf(logit) < INFINITY)) return logit;
    if (change.occurred) logit = logit > 0.0f ? logit / penalties.repetition : logit * penalties.repetition;
    if (change.generated > 0) {
        logit -= penalties.presence + penalties.frequency * static_cast<float>(change.generated);
    }
    constexpr float MOST = 3.40282347e38f;
    return fminf(fmaxf(logit + change.bias, -MOST), MOST);
}

// Which ids are left, and what they weigh.
struct Kept {
    Weights weights;
    u64 floor, least;

    __device__ __forceinline__ u64 weight(u32 id, float logit) const {
        if (rank_key(logit, id) < floor) return 0;
        u64 weight = weights.of(logit);
        return weight < least ? 0 : weight;
    }
};

// The key of the last of the fewest best ids whose share of all weights is at least top_p. An id that weighs less than
// (1 − top_p) / V is none of them, for all of these together weigh less than what may be left out: beyond, no distances are told
// apart.
__device__ __forceinline__ u64 last_of_share(const Row& row, const Kept& kept, Search& search, const Draw& draw) {
    constexpr float MOST = 3.40282347e38f;
    float furthest = FINENESS * logf(row.vocab / (1.0f - draw.top_p)) + 2.0f;
    u32 last = min(BINS - 1, static_cast<u32>(furthest));
    Narrowing narrowing{kept.weights.best, fminf(FINENESS / draw.temperature, MOST), last, kept.floor};
    auto share = [&](u64 total) { return static_cast<u64>(ceil(draw.top_p * static_cast<double>(total))); };
    return last_of_best(row, narrowing, search, [&](float logit) { return kept.weights.of(logit); }, share);
}

// The id at which the running sum of weights, ascending by id, passes the fraction u of all.
__device__ __forceinline__ u32 walk(const Row& row, const Kept& kept, double u) {
    SHARED(u64, tiles, [RANK_THREADS]);
    SHARED(Reached, reached, [1]);
    SHARED(u32, found, [1]);
    tiles[threadIdx.x] = 0;
    __syncthreads();
    for_tiles(row, [&](u32 tile, const Four& four) {
        u64 sum = 0;
        for_allowed(four, [&](u32 id, float logit) { sum += kept.weight(id, logit); });
        if (!__any_sync(0xffffffff, sum > 0)) return;
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) atomicAdd(&tiles[tile], sum);
    });
    __syncthreads();
    u64 own = tiles[threadIdx.x], total;
    u64 before = sum_before(own, total);
    u64 wanted = min(static_cast<u64>(u * static_cast<double>(total)), total - 1);
    if (before <= wanted && wanted < before + own) reached[0] = {threadIdx.x, before};
    __syncthreads();
    Four four = load_four(row, reached[0].bin * TILE + threadIdx.x * 4);
    own = 0;
    for_allowed(four, [&](u32 id, float logit) { own += kept.weight(id, logit); });
    before = reached[0].before + sum_before(own, total);
    for_allowed(four, [&](u32 id, float logit) {
        u64 weight = kept.weight(id, logit);
        if (before <= wanted && wanted < before + weight) found[0] = id;
        before += weight;
    });
    __syncthreads();
    return found[0];
}

// The token of a row; NO_TOKEN where a logit is not finite or nothing may be drawn.
__device__ __forceinline__ u32 sample_row(const Row& row, const Draw& draw) {
    u64 best = best_key(row);
    if (best == 0 || best == BROKEN) return NO_TOKEN;
    if (draw.temperature == 0.0f) return id_of(best);
    float highest = logit_of(best);
    SHARED(Search, search, [1]);
    Kept kept{Weights(highest, draw.temperature, row.vocab), 0, 1};
    if (draw.top_k > 0 && draw.top_k < row.vocab) {
        kept.floor = last_of_count(row, highest, search[0], draw.top_k);
    }
    if (draw.top_p < 1.0f) {
        kept.floor = max(kept.floor, last_of_share(row, kept, search[0], draw));
    }
    kept.least = max(u64{1}, static_cast<u64>(ceil(draw.min_p * kept.weights.one)));
    return walk(row, kept, draw.u);
}
