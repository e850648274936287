// Logits of a gate: few outputs of rows that are not rounded.
#pragma once

#include "math.cuh"

constexpr u32 LOGIT_THREADS = 256;
// Outputs of a block, a warp each, and the rows that it has them of.
constexpr u32 LOGIT_OUTPUTS = LOGIT_THREADS / 32;
constexpr u32 LOGIT_ROWS = 4;

// One output of the rows first..first + LOGIT_ROWS, as far as there are such; one warp. A lane adds elements lane, lane + 32, …;
// then lanes are added pairwise.
__device__ __forceinline__ void output_logits(const float* x, const bf16* weights, float* y, u32 first, u32 rows, u32 inner,
                                              u32 outputs) {
    const float* row[LOGIT_ROWS];
    float sums[LOGIT_ROWS] = {};
    for (u32 r = 0; r < LOGIT_ROWS; r++) row[r] = x + u64{min(first + r, rows - 1)} * inner;
#pragma unroll 8
    for (u32 k = threadIdx.x % 32; k < inner; k += 32) {
        float weight = to_float(weights[k]);
        for (u32 r = 0; r < LOGIT_ROWS; r++) sums[r] = fmaf(row[r][k], weight, sums[r]);
    }
    for (u32 r = 0; r < LOGIT_ROWS; r++) {
        float sum = warp_sum(sums[r]);
        if (threadIdx.x % 32 == 0 && first + r < rows) y[u64{first + r} * outputs] = sum;
    }
}
