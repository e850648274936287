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

// Queries q [T, n, dn + dr] on their way to another product of the heads, rounded: what has no position to nope [T, n, dn], the
// roped rest into absorbed [T, n, r + dr], behind what the product writes there. Grid: (T, n).
KERNEL(split_queries, const float* q, const float* cos, const float* sin, const u32* positions, bf16* nope_out,
       bf16* absorbed, u32 nope, u32 rope, u32 latent) {
    u64 head = u64{blockIdx.x} * gridDim.y + blockIdx.y, angle = u64{positions[blockIdx.x]} * (rope / 2);
    const float* from = q + head * (nope + rope);
    for_row(nope, [=](u32 i) { nope_out[head * nope + i] = to_bf16(from[i]); });
    for_row(rope / 2, [=](u32 i) {
        float2 pair = rotated(from + nope, cos + angle, sin + angle, i);
        bf16* to = absorbed + head * (latent + rope) + latent + 2 * i;
        to[0] = to_bf16(pair.x);
        to[1] = to_bf16(pair.y);
    });
}
