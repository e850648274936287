// The choice of experts of one row, by a block.
#pragma once

#include "math.cuh"

constexpr u32 GATE_THREADS = 256;
constexpr u32 SOFTMAX = 0, SIGMOID = 1;                            // scoring
constexpr u32 GREEDY = 0, GROUP_LIMITED_GREEDY = 1, NOAUX_TC = 2;  // method
constexpr u32 SCALED = 0, NORMALISED = 1, NORMALISED_SCALED = 2;   // rule of weights
constexpr u32 NO_EXPERT = 0xffffffff;

struct Gate {
    u32 experts, groups, top_groups, top_k, scoring, method, rule;
    float scale;
};

// Shared memory of a block.
struct GateMemory {
    float* scores;     // [E]
    float* ranking;    // [E]: scores, the bias added where the method has one
    float* groups;     // [G]
    u32* kept;         // [G]
    u32* chosen;       // [E]

    __device__ __forceinline__ GateMemory(u32 experts, u32 count)
        : scores(reinterpret_cast<float*>(dynamic_shared())),
          ranking(scores + experts),
          groups(ranking + experts),
          kept(reinterpret_cast<u32*>(groups + count)),
          chosen(kept + count) {}
};

// Unsigned numbers in the order of floats, −0 before 0.
__device__ __forceinline__ u32 ordered(float x) {
    u32 bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

// Higher score first, then lower index.
__device__ __forceinline__ bool better(const float* scores, u32 a, u32 b) {
    u32 x = ordered(scores[a]), y = ordered(scores[b]);
    return x > y || (x == y && a < b);
}

// The scores of a row from its logits. One thread adds up those of a softmax, in ascending order.
__device__ __forceinline__ void score_experts(const Gate& gate, const float* logits, float* scores) {
    if (gate.scoring == SIGMOID) {
        for (u32 e = threadIdx.x; e < gate.experts; e += GATE_THREADS) scores[e] = 1.0f / (1.0f + exp_f32(-logits[e]));
        return;
    }
    SHARED(float, total, [1]);
    float most = -INFINITY;
    for (u32 e = threadIdx.x % 32; e < gate.experts; e += 32) most = fmaxf(most, logits[e]);
    most = warp_max(most);
    for (u32 e = threadIdx.x; e < gate.experts; e += GATE_THREADS) scores[e] = exp_f32(logits[e] - most);
    __syncthreads();
    if (threadIdx.x == 0) {
        float sum = 0.0f;
        for (u32 e = 0; e < gate.experts; e++) sum += scores[e];
        total[0] = sum;
    }
    __syncthreads();
    for (u32 e = threadIdx.x; e < gate.experts; e += GATE_THREADS) scores[e] /= total[0];
}

// What a group is ranked by: its best expert, or the sum of its two best.
__device__ __forceinline__ float group_score(const Gate& gate, const float* ranking, u32 group) {
    u32 size = gate.experts / gate.groups;
    float first = -INFINITY, second = -INFINITY;
    for (u32 e = group * size; e < (group + 1) * size; e++) {
        float score = ranking[e];
        if (score > first) second = first, first = score;
        else second = fmaxf(second, score);
    }
    return gate.method == NOAUX_TC && size > 1 ? first + second : first;
}

__device__ __forceinline__ void keep_groups(const Gate& gate, const GateMemory& memory) {
    for (u32 g = threadIdx.x; g < gate.groups; g += GATE_THREADS) memory.groups[g] = group_score(gate, memory.ranking, g);
    __syncthreads();
    for (u32 g = threadIdx.x; g < gate.groups; g += GATE_THREADS) {
        u32 rank = 0;
        for (u32 other = 0; other < gate.groups; other++) rank += better(memory.groups, other, g);
        memory.kept[g] = gate.method == GREEDY || rank < gate.top_groups;
    }
}

__device__ __forceinline__ void choose_experts(const Gate& gate, const GateMemory& memory) {
    u32 size = gate.experts / gate.groups;
    for (u32 e = threadIdx.x; e < gate.experts; e += GATE_THREADS) {
        u32 rank = 0;
        for (u32 other = 0; other < gate.experts; other++) {
            rank += memory.kept[other / size] && better(memory.ranking, other, e);
        }
        memory.chosen[e] = memory.kept[e / size] && rank < gate.top_k;
    }
}

// Writes the chosen experts in ascending order, with their weights.
__device__ __forceinline__ void weigh_experts(const Gate& gate, const GateMemory& memory, u32* ids, float* weights) {
    for (u32 e = threadIdx.x; e < gate.experts; e += GATE_THREADS) {
        if (!memory.chosen[e]) continue;
        float sum = 0.0f;
        u32 at = 0;
        for (u32 other = 0; other < gate.experts; other++) {
            if (!memory.chosen[other]) continue;
            sum += memory.scores[other];
            at += other < e;
        }
        float weight = memory.scores[e];
        if (gate.rule != SCALED) weight = weight / (sum + 1e-20f);
        if (gate.rule != NORMALISED) weight = weight * gate.scale;
        ids[at] = e;
        weights[at] = weight;
    }
}

// logits [E], bias [E] or null → ids [K] ascending, weights [K]. Where a logit is not finite, all ids are NO_EXPERT.
__device__ __forceinline__ void select_experts(const Gate& gate, const float* logits, const float* bias, u32* ids,
                                               float* weights) {
    GateMemory memory(gate.experts, gate.groups);
    bool finite = true;
    for (u32 e = threadIdx.x % 32; e < gate.experts; e += 32) finite = finite && fabsf(logits[e]) < INFINITY;
    if (!__all_sync(0xffffffff, finite)) {
        for (u32 at = threadIdx.x; at < gate.top_k; at += GATE_THREADS) ids[at] = NO_EXPERT, weights[at] = 0.0f;
        return;
    }
    score_experts(gate, logits, memory.scores);
    for (u32 e = threadIdx.x; e < gate.experts; e += GATE_THREADS) {
        memory.ranking[e] = gate.method == NOAUX_TC ? memory.scores[e] + bias[e] : memory.scores[e];
    }
    __syncthreads();
    keep_groups(gate, memory);
    __syncthreads();
    choose_experts(gate, memory);
    __syncthreads();
    weigh_experts(gate, memory, ids, weights);
}
