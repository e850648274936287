#include "gate_logits.cuh"

// y [rows, outputs] = x [rows, inner] · Wᵀ, w [outputs, inner]; x is not rounded. Grid: (outputs in eights, rows in fours).
KERNEL_BOUNDS(gate_logits, (LOGIT_THREADS), const float* x, const bf16* w, float* y, u32 rows, u32 inner, u32 outputs) {
    u32 output = blockIdx.x * LOGIT_OUTPUTS + threadIdx.x / 32;
    if (output >= outputs) return;
    output_logits(x, w + u64{output} * inner, y + output, blockIdx.y * LOGIT_ROWS, rows, inner, outputs);
}
