#include "heads.cuh"

// Absorbed queries: q [T, n, dn + dr] → out [T, n, r + dr]: uk [n, r, dn] · round(q_nope), then the roped rest of q.
// cos, sin [positions, dr / 2]; positions [T]. Grid: (tiles of r, tiles of T, n).
KERNEL_BOUNDS(mla_queries, (TILE_THREADS), const float* q, const bf16* uk, const float* cos, const float* sin,
              const u32* positions, float* out, u32 rows, u32 nope, u32 rope, u32 latent) {
    head_tile(q, nope + rope, uk, out, latent + rope, rows, nope, latent);
    if (blockIdx.x > 0) return;
    u32 pairs = rope / 2, first = blockIdx.y * TILE_ROWS;
    for (u32 at = threadIdx.x; at < TILE_ROWS * pairs; at += TILE_THREADS) {
        u32 row = first + at / pairs, pair = at % pairs;
        if (row >= rows) break;
        u64 head = u64{row} * gridDim.z + blockIdx.z, angle = u64{positions[row]} * pairs;
        float2 value = rotated(q + head * (nope + rope) + nope, cos + angle, sin + angle, pair);
        float* to = out + head * (latent + rope) + latent + 2 * pair;
        to[0] = value.x;
        to[1] = value.y;
    }
}

// Values: o_lat [T, n, r] → out [T, n, dv]: uv [n, dv, r] · round(o_lat). Grid: (tiles of dv, tiles of T, n).
KERNEL_BOUNDS(mla_values, (TILE_THREADS), const float* o_lat, const bf16* uv, float* out, u32 rows, u32 latent, u32 value) {
    head_tile(o_lat, latent, uv, out, value, rows, latent, value);
}
