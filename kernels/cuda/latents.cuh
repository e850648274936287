// What one position leaves in the latent cache.
#pragma once

#include "rows.cuh"

// kv [r + dr] → out [r + dr], rounded: the normed latent, then the roped key. gain [r].
__device__ __forceinline__ void write_latent(const float* kv, const float* gain, const float* cos, const float* sin,
                                             bf16* out, u32 latent, u32 rope) {
    constexpr float EPS = 1e-6f;
    float factor = norm_factor(kv, latent, EPS);
    for_row(latent, [=](u32 i) { out[i] = to_bf16(gain[i] * (kv[i] * factor)); });
    for_row(rope / 2, [=](u32 i) {
        float2 pair = rotated(kv + latent, cos, sin, i);
        out[latent + 2 * i] = to_bf16(pair.x);
        out[latent + 2 * i + 1] = to_bf16(pair.y);
    });
}
