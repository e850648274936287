#include "sample.cuh"

// out [T]: a token drawn from each row of logits [T, V] by draws [T]. allowed [ceil(V / 32)]: bits of the ids that may be
// drawn, or null. weights [T, V] is for this kernel's own use. NO_TOKEN as in sample_row. Grid: T.
KERNEL_BOUNDS(sample, (SAMPLE_THREADS), const float* logits, const u32* allowed, const Draw* draws, double* weights,
              u32* out, u32 vocab) {
    u64 first = u64{blockIdx.x} * vocab;
    Candidates row{logits + first, weights + first, vocab};
    u32 token = sample_row(row, allowed, draws[blockIdx.x]);
    if (threadIdx.x == 0) out[blockIdx.x] = token;
}

// Penalties and biases: changes [N], each of another logit of logits [T, V]; penalties [T].
KERNEL(adjust_logits, float* logits, const Adjustment* changes, const Penalties* penalties, u32 vocab, u32 count) {
    u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    Adjustment change = changes[at];
    float* logit = logits + u64{change.row} * vocab + change.id;
    *logit = adjusted(*logit, change, penalties[change.row]);
}
