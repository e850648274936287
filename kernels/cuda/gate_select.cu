#include "gate_select.cuh"

// logits [T, E], bias [E] (null unless the method is NOAUX_TC) → ids [T, K], ascending in a row, and weights [T, K]. Between
// equal scores the lower index wins. Grid: T.
KERNEL_BOUNDS(gate_select, (GATE_THREADS), const float* logits, const float* bias, u32* ids, float* weights, u32 experts,
              u32 groups, u32 top_groups, u32 top_k, u32 scoring, u32 method, u32 rule, float scale) {
    Gate gate{experts, groups, top_groups, top_k, scoring, method, rule, scale};
    u64 row = blockIdx.x;
    select_experts(gate, logits + row * experts, bias, ids + row * top_k, weights + row * top_k);
}
