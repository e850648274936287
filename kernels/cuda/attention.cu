#include "attention.cuh"

// Reduces one split of keys: q [T, n, r + dr], rounded here, and cache [slots, r + dr] → out [T, n, splits, r + 2]. Row t is
// of sequence sequences[t] and sees keys[t] positions; the cache blocks of sequence s begin at blocks[first_block[s]]. A
// split past a row's keys is not written. Grid: (T, heads in eights, splits).
KERNEL_BOUNDS(mla_splits, (SPLIT_THREADS), const float* q, const bf16* cache, const u32* sequences, const u32* keys,
              const u32* first_block, const u32* blocks, float* out, u32 heads, u32 latent, u32 rope, float scale) {
    u32 row = blockIdx.x, first_head = blockIdx.y * SPLIT_HEADS, first_key = blockIdx.z * SPLIT;
    if (first_key >= keys[row]) return;
    u32 width = latent + rope;
    Split split{min(SPLIT, keys[row] - first_key), min(SPLIT_HEADS, heads - first_head), latent, width, scale};
    SplitMemory memory(width);
    const u32* pages = blocks + first_block[sequences[row]];
    for (u32 key = threadIdx.x; key < split.keys; key += SPLIT_THREADS) {
        u32 position = first_key + key;
        memory.slots[key] = pages[position / PAGE] * PAGE + position % PAGE;
    }
    const float* queries = q + (u64{row} * heads + first_head) * width;
    for (u32 i = threadIdx.x; i < SPLIT_HEADS * width; i += SPLIT_THREADS) {
        memory.q[i] = i < split.heads * width ? round_to_bf16(queries[i]) : 0.0f;
    }
    u64 stride = u64{gridDim.z} * (latent + 2);
    float* to = out + ((u64{row} * heads + first_head) * gridDim.z + blockIdx.z) * (latent + 2);
    __syncthreads();
    score_keys(split, memory, cache);
    __syncthreads();
    weigh_keys(split, memory, to, stride);
    __syncthreads();
    sum_latents(split, memory, cache, to, stride);
}

// splits [T, n, count, r + 2] → out [T, n, r]: those of the splits that row t has, keys [T]. Grid: (T, n).
KERNEL(merge_splits, const float* splits, const u32* keys, float* out, u32 count, u32 latent) {
    u64 head = u64{blockIdx.x} * gridDim.y + blockIdx.y;
    merge_head(splits + head * count * (latent + 2), ceil_div(keys[blockIdx.x], SPLIT), latent,
               [=](u32 i, float value) { out[head * latent + i] = value; });
}

// The same, rounded.
KERNEL(merge_splits_bf16, const float* splits, const u32* keys, bf16* out, u32 count, u32 latent) {
    u64 head = u64{blockIdx.x} * gridDim.y + blockIdx.y;
    merge_head(splits + head * count * (latent + 2), ceil_div(keys[blockIdx.x], SPLIT), latent,
               [=](u32 i, float value) { out[head * latent + i] = to_bf16(value); });
}
