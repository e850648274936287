#include "latents.cuh"

// kv [T, r + dr] → cache [slots, r + dr] at slots [T]. gain [r]; cos, sin [positions, dr / 2]; positions [T]. Grid: T.
KERNEL(write_latents, const float* kv, const float* gain, const float* cos, const float* sin, const u32* positions,
       const u32* slots, bf16* cache, u32 latent, u32 rope) {
    u64 width = latent + rope, angle = u64{positions[blockIdx.x]} * (rope / 2);
    write_latent(kv + blockIdx.x * width, gain, cos + angle, sin + angle, cache + slots[blockIdx.x] * width, latent, rope);
}
