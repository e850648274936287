#include "argmax.cuh"

// out [T]: where logits [T, V] are highest, the lowest id among equals; NO_TOKEN where one is not finite. Grid: T.
KERNEL_BOUNDS(argmax, (ARGMAX_THREADS), const float* logits, u32* out, u32 vocab) {
    Best best = best_of_row(logits + u64{blockIdx.x} * vocab, vocab);
    if (threadIdx.x == 0) out[blockIdx.x] = best.id;
}
