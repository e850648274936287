// Absorbed causal attention over the latent cache, in fixed splits of positions.
//
// A block reduces the keys of one split for up to eight heads of one row, to [max, sum, latents..] a head: the largest
// score, the sum of exp(score − max), and the latents summed with these weights. Slots past the row's position are not read.
#pragma once

#include "math.cuh"

constexpr u32 SPLIT = 512;        // positions of a split
constexpr u32 PAGE = 64;          // positions of a cache block
constexpr u32 SPLIT_HEADS = 8;    // heads that a block reduces, a warp each where one head is enough
constexpr u32 SPLIT_THREADS = 256;

// What a block reduces.
struct Split {
    u32 keys;            // positions of it that the row sees
    u32 heads;           // heads that exist
    u32 latent, width;   // r, r + dr
    float scale;
};

// Shared memory of a block: queries [SPLIT_HEADS, width], then weights [SPLIT_HEADS, SPLIT], then slots [SPLIT].
struct SplitMemory {
    float* q;
    float* weights;
    u32* slots;

    __device__ __forceinline__ explicit SplitMemory(u32 width)
        : q(reinterpret_cast<float*>(dynamic_shared())),
          weights(q + SPLIT_HEADS * width),
          slots(reinterpret_cast<u32*>(weights + SPLIT_HEADS * SPLIT)) {}
};

// Scores of all keys: a warp takes a key; a lane adds elements i, i + 32, …; then lanes are added pairwise.
__device__ __forceinline__ void score_keys(const Split& split, const SplitMemory& memory, const bf16* cache) {
    u32 lane = threadIdx.x % 32;
    for (u32 key = threadIdx.x / 32; key < split.keys; key += SPLIT_THREADS / 32) {
        const bf16* row = cache + u64{memory.slots[key]} * split.width;
        float sums[SPLIT_HEADS] = {};
        for (u32 i = lane; i < split.width; i += 32) {
            float value = to_float(row[i]);
            for (u32 head = 0; head < SPLIT_HEADS; head++) {
                sums[head] = fmaf(memory.q[head * split.width + i], value, sums[head]);
            }
        }
        for (u32 head = 0; head < SPLIT_HEADS; head++) {
            float score = warp_sum(sums[head]) * split.scale;
            if (lane == 0) memory.weights[head * SPLIT + key] = score;
        }
    }
}

// Scores to weights exp(score − max), a warp a head; writes max and sum of head h to out[h · stride].
__device__ __forceinline__ void weigh_keys(const Split& split, const SplitMemory& memory, float* out, u64 stride) {
    u32 head = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* weights = memory.weights + head * SPLIT;
    float most = -INFINITY, sum = 0.0f;
    for (u32 key = lane; key < split.keys; key += 32) most = fmaxf(most, weights[key]);
    most = warp_max(most);
    for (u32 key = lane; key < split.keys; key += 32) {
        weights[key] = exp_f32(weights[key] - most);
        sum += weights[key];
    }
    sum = warp_sum(sum);
    if (lane > 0 || head >= split.heads) return;
    out[head * stride] = most;
    out[head * stride + 1] = sum;
}

// Latents summed in ascending position, a thread an element, to out[h · stride + 2..].
__device__ __forceinline__ void sum_latents(const Split& split, const SplitMemory& memory, const bf16* cache, float* out,
                                            u64 stride) {
    for (u32 i = threadIdx.x; i < split.latent; i += SPLIT_THREADS) {
        float sums[SPLIT_HEADS] = {};
        for (u32 key = 0; key < split.keys; key++) {
            float value = to_float(cache[u64{memory.slots[key]} * split.width + i]);
            for (u32 head = 0; head < SPLIT_HEADS; head++) {
                sums[head] = fmaf(memory.weights[head * SPLIT + key], value, sums[head]);
            }
        }
        for (u32 head = 0; head < SPLIT_HEADS; head++) {
            if (head < split.heads) out[head * stride + 2 + i] = sums[head];
        }
    }
}

// Merges splits [count, r + 2] of one head in ascending order: `store(i, value)` takes latents [r].
template <class Store>
__device__ __forceinline__ void merge_head(const float* splits, u32 count, u32 latent, Store store) {
    for (u32 i = threadIdx.x; i < latent; i += blockDim.x) {
        float most = -INFINITY, sum = 0.0f, value = 0.0f;
        for (u32 at = 0; at < count; at++) {
            const float* split = splits + u64{at} * (latent + 2);
            float larger = fmaxf(most, split[0]);
            float keep = exp_f32(most - larger), take = exp_f32(split[0] - larger);
            sum = sum * keep + split[1] * take;
            value = value * keep + split[2 + i] * take;
            most = larger;
        }
        store(i, count > 0 ? value / sum : 0.0f);
    }
}
