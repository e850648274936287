// Attention over keys and values that are expanded from the latents: of the rows of one sequence, for any sizes.
//
// Keys come chunk after chunk. What a row has so far waits in memory meanwhile: [max, sum, values..], the largest score, the sum
// of exp(score − max), and the values summed with these weights.
#pragma once

#include "rows.cuh"

constexpr u32 EXPANDED_THREADS = 128;
// Positions of a cache block; keys of a chunk that a row attends to at once.
constexpr u32 CACHE_BLOCK = 64, KEYS_AT_ONCE = 256;

// Where a position of a sequence lies in the cache, by its blocks.
__device__ __forceinline__ u64 cache_slot(const u32* blocks, u32 position) {
    return u64{blocks[position / CACHE_BLOCK]} * CACHE_BLOCK + position % CACHE_BLOCK;
}

// What a row and head attends to.
struct Expanded {
    const float* kv;      // [C, n, dn + dv], of this head; rounded here
    const bf16* cache;    // [slots, r + dr]: the roped keys
    const u32* blocks;    // of the sequence
    u64 kv_stride;
    u32 first;            // position of the first key
    u32 nope, rope, value, latent;
    float scale;
};

// Shared memory: the query, values so far, and scores or weights of some keys.
struct ExpandedMemory {
    float *q, *values, *scores;

    __device__ __forceinline__ explicit ExpandedMemory(const Expanded& it) {
        q = reinterpret_cast<float*>(dynamic_shared());
        values = q + it.nope + it.rope;
        scores = values + it.value;
    }
};

__device__ __forceinline__ float score_key(const Expanded& it, const ExpandedMemory& memory, u32 key) {
    const float* row = it.kv + key * it.kv_stride;
    const bf16* roped = cache_slot(it.blocks, it.first + key) * (it.latent + it.rope) + it.cache + it.latent;
    float sum = 0.0f;
    for (u32 i = 0; i < it.nope; i++) sum = fmaf(memory.q[i], round_to_bf16(row[i]), sum);
    for (u32 i = 0; i < it.rope; i++) sum = fmaf(memory.q[it.nope + i], to_float(roped[i]), sum);
    return sum * it.scale;
}

// Adds keys `begin..begin + count` of the chunk to what the row has so far. Begins and ends with a barrier.
__device__ __forceinline__ void add_keys(const Expanded& it, const ExpandedMemory& memory, u32 begin, u32 count, float& most,
                                         float& sum) {
    __syncthreads();
    for (u32 key = threadIdx.x; key < count; key += EXPANDED_THREADS) memory.scores[key] = score_key(it, memory, begin + key);
    __syncthreads();
    float largest = most;
    for (u32 key = 0; key < count; key++) largest = fmaxf(largest, memory.scores[key]);
    float keep = exp_f32(most - largest);
    most = largest;
    __syncthreads();
    for (u32 key = threadIdx.x; key < count; key += EXPANDED_THREADS) memory.scores[key] = exp_f32(memory.scores[key] - most);
    __syncthreads();
    sum *= keep;
    for (u32 key = 0; key < count; key++) sum += memory.scores[key];
    for (u32 i = threadIdx.x; i < it.value; i += EXPANDED_THREADS) {
        const float* column = it.kv + begin * it.kv_stride + it.nope + i;
        float value = memory.values[i] * keep;
        for (u32 key = 0; key < count; key++) value = fmaf(memory.scores[key], round_to_bf16(column[key * it.kv_stride]), value);
        memory.values[i] = value;
    }
}
