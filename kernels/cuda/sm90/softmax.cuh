// What attention on sm_90a makes of the scores of a page of 64 keys: weights, with a running maximum of each row.
#pragma once

#include "primitives.cuh"

namespace conclave::sm90 {

constexpr float MINUS_INFINITY = -INFINITY, LOG2_E = 1.44269504f;
/// Registers of a product [64, 64].
constexpr u32 SCORES = 32;

/// A row's running maximum of scores as they come from the product, and the thread's share of the sum of its weights.
struct Softmax {
    float max[2] = {MINUS_INFINITY, MINUS_INFINITY};
    float sum[2] = {0.0f, 0.0f};
};

/// The largest of one row's scores of a page, over the four lanes that hold it.
__device__ __forceinline__ float largest(const float (&s)[SCORES], u32 half) {
    float max = MINUS_INFINITY;
#pragma unroll
    for (u32 i = 0; i < SCORES; i += 4) max = fmaxf(max, fmaxf(s[i + 2 * half], s[i + 2 * half + 1]));
    max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 1));
    return fmaxf(max, __shfl_xor_sync(0xffffffff, max, 2));
}

/// Scores of a page's keys, from key `first` on, that a row does not see become minus infinity, whatever lies in their slots:
/// the thread's two rows see so many keys.
__device__ __forceinline__ void mask(const u32 (&seen)[2], u32 first, float (&s)[SCORES]) {
#pragma unroll
    for (u32 i = 0; i < SCORES; ++i) {
        u32 key = first + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
        if (key >= seen[i / 2 % 2]) s[i] = MINUS_INFINITY;
    }
}

/// Makes rounded weights of a page's scores, as left operands of four products, and the factors of the sums so far.
__device__ __forceinline__ void weigh(
    const float (&s)[SCORES], float scale, Softmax& softmax, u32 (&weights)[4][4], float (&factors)[2]) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        float max = fmaxf(softmax.max[half], largest(s, half));
        float base = max == MINUS_INFINITY ? 0.0f : max * scale;
        factors[half] = power_of_two(softmax.max[half] * scale - base);
        softmax.max[half] = max;
        float sum = 0.0f;
#pragma unroll
        for (u32 i = 0; i < SCORES; i += 4) {
            float low = power_of_two(fmaf(s[i + 2 * half], scale, -base));
            float high = power_of_two(fmaf(s[i + 2 * half + 1], scale, -base));
            u32 pair = pack_bf16(low, high);
            sum += __uint_as_float(pair << 16) + __uint_as_float(pair & 0xffff0000);
            weights[i / 8][i / 4 % 2 * 2 + half] = pair;
        }
        softmax.sum[half] = fmaf(softmax.sum[half], factors[half], sum);
    }
}

/// Multiplies sums by the factors of their rows.
template <u32 N>
__device__ __forceinline__ void rescale(const float (&factors)[2], float (&sums)[N]) {
#pragma unroll
    for (u32 i = 0; i < N; ++i) sums[i] *= factors[i / 2 % 2];
}

/// Gives a barrier this warp's arrival.
__device__ __forceinline__ void arrive_warp(Barrier* barrier) {
    if (threadIdx.x % WARP == 0) barrier_arrive(barrier);
}

}  // namespace conclave::sm90
