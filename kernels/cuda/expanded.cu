#include "expanded.cuh"

// Latents of positions first.. of a sequence, from cache [slots, width] by its blocks, to out [rows, r]; from row `count` on
// zeros. Grid: rows.
KERNEL(gather_latents, const bf16* cache, const u32* blocks, bf16* out, u32 first, u32 count, u32 latent, u32 width) {
    bool there = blockIdx.x < count;
    const bf16* row = there ? cache + cache_slot(blocks, first + blockIdx.x) * width : cache;
    for_row(latent, [=](u32 i) { out[u64{blockIdx.x} * latent + i] = there ? row[i] : to_bf16(0.0f); });
}

// Queries q [R, n, dn + dr] roped and rounded, head by head: out [n, R, dn + dr]. cos, sin [positions, dr / 2]; positions [R].
// Grid: (R, n).
KERNEL(rope_queries, const float* q, const float* cos, const float* sin, const u32* positions, bf16* out, u32 nope, u32 rope) {
    u64 angle = u64{positions[blockIdx.x]} * (rope / 2), width = nope + rope;
    const float* from = q + (u64{blockIdx.x} * gridDim.y + blockIdx.y) * width;
    bf16* to = out + (u64{blockIdx.y} * gridDim.x + blockIdx.x) * width;
    for_row(nope, [=](u32 i) { to[i] = to_bf16(from[i]); });
    for_row(rope / 2, [=](u32 i) {
        float2 pair = rotated(from + nope, cos + angle, sin + angle, i);
        to[nope + 2 * i] = to_bf16(pair.x);
        to[nope + 2 * i + 1] = to_bf16(pair.y);
    });
}

// Adds keys of positions first..first + count, kv [count, n, dn + dv] and the roped ones of cache [slots, r + dr], to sums
// [R, n, 2 + dv] of queries q [n, R, dn + dr] of positions `position`..; sums begin anew where `fresh`. Grid: (R, n).
KERNEL_BOUNDS(mla_expanded, (EXPANDED_THREADS), const bf16* q, const float* kv, const bf16* cache, const u32* blocks, float* sums,
              u32 position, u32 first, u32 count, u32 fresh, u32 nope, u32 rope, u32 value, u32 latent, float scale) {
    u32 row = blockIdx.x, head = blockIdx.y, rows = gridDim.x, heads = gridDim.y, width = nope + rope;
    Expanded it{kv + u64{head} * (nope + value), cache, blocks, u64{heads} * (nope + value), first,
                nope, rope, value, latent, scale};
    ExpandedMemory memory(it);
    float* so_far = sums + (u64{row} * heads + head) * (2 + value);
    const bf16* query = q + (u64{head} * rows + row) * width;
    for (u32 i = threadIdx.x; i < width; i += EXPANDED_THREADS) memory.q[i] = to_float(query[i]);
    for (u32 i = threadIdx.x; i < value; i += EXPANDED_THREADS) memory.values[i] = fresh ? 0.0f : so_far[2 + i];
    float most = fresh ? -INFINITY : so_far[0], sum = fresh ? 0.0f : so_far[1];
    u32 end = position + row + 1, seen = end > first ? min(end - first, count) : 0;
    for (u32 at = 0; at < seen; at += KEYS_AT_ONCE) add_keys(it, memory, at, min(KEYS_AT_ONCE, seen - at), most, sum);
    __syncthreads();
    for (u32 i = threadIdx.x; i < value; i += EXPANDED_THREADS) so_far[2 + i] = memory.values[i];
    if (threadIdx.x > 0) return;
    so_far[0] = most;
    so_far[1] = sum;
}

// out [R, n, dv]: the means that sums [R, n, 2 + dv] hold. Grid: (R, n).
KERNEL(finish_expanded, const float* sums, float* out, u32 value) {
    u64 head = u64{blockIdx.x} * gridDim.y + blockIdx.y;
    const float* from = sums + head * (2 + value);
    for_row(value, [=](u32 i) { out[head * value + i] = from[2 + i] / from[1]; });
}

// The same, rounded.
KERNEL(finish_expanded_bf16, const float* sums, bf16* out, u32 value) {
    u64 head = u64{blockIdx.x} * gridDim.y + blockIdx.y;
    const float* from = sums + head * (2 + value);
    for_row(value, [=](u32 i) { out[head * value + i] = to_bf16(from[2 + i] / from[1]); });
}
