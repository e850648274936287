#include "elementwise.cuh"

// out [n] = x [n], rounded
KERNEL(round_bf16, const float* x, bf16* out, u64 n) {
    for_each(n, [=](u64 i) { out[i] = to_bf16(x[i]); });
}

// out [n] = x [n]
KERNEL(decode_bf16, const bf16* x, float* out, u64 n) {
    for_each(n, [=](u64 i) { out[i] = to_float(x[i]); });
}

// x [n] += delta [n]
KERNEL(add, float* x, const float* delta, u64 n) {
    for_each(n, [=](u64 i) { x[i] += delta[i]; });
}

// x [n] += a [n] + b [n], the sum of the two first
KERNEL(add_two, float* x, const float* a, const float* b, u64 n) {
    for_each(n, [=](u64 i) { x[i] += a[i] + b[i]; });
}

// out [n] = silu(gate [n]) ⊙ up [n], rounded
KERNEL(swiglu, const float* gate, const float* up, bf16* out, u64 n) {
    for_each(n, [=](u64 i) { out[i] = to_bf16(silu_times(gate[i], up[i])); });
}
