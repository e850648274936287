#include "sample.cuh"

// tokens [R]: of the rows of logits [R, V] that draws [N] name, what they draw; masks [M, words]: bits of the ids that may be
// drawn. NO_TOKEN as in sample_row. V is at most 2^20. Grid: N.
KERNEL_BOUNDS(sample, (RANK_THREADS, 2), const float* logits, const Draw* draws, const u32* masks, u32* tokens, u32 vocab,
              u32 words) {
    Draw draw = draws[blockIdx.x];
    Row row{logits + u64{draw.row} * vocab, masks + u64{draw.mask} * words, vocab};
    u32 token = sample_row(row, draw);
    if (threadIdx.x == 0) tokens[draw.row] = token;
}

// Penalties and biases: changes [N], each of another logit of logits [R, V]; penalties [R].
KERNEL(adjust_logits, float* logits, Adjustment* changes, const Penalties* penalties, u32 vocab, u32 count) {
    u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    Adjustment change = changes[at];
    float* logit = logits + u64{change.row} * vocab + change.id;
    changes[at].before = *logit;
    *logit = adjusted(*logit, change, penalties[change.row]);
}

// The logits as they were before adjust_logits.
KERNEL(restore_logits, float* logits, const Adjustment* changes, u32 vocab, u32 count) {
    u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at < count) logits[u64{changes[at].row} * vocab + changes[at].id] = changes[at].before;
}
