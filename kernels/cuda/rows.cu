#include "rows.cuh"

// out [T, H] = table [V, H] at tokens [T]. Grid: T.
KERNEL(embed_bf16, const bf16* table, const u32* tokens, float* out, u32 hidden) {
    const bf16* row = table + u64{tokens[blockIdx.x]} * hidden;
    for_row(hidden, [=](u32 i) { out[u64{blockIdx.x} * hidden + i] = to_float(row[i]); });
}

// The same from a table of f32.
KERNEL(embed_f32, const float* table, const u32* tokens, float* out, u32 hidden) {
    const float* row = table + u64{tokens[blockIdx.x]} * hidden;
    for_row(hidden, [=](u32 i) { out[u64{blockIdx.x} * hidden + i] = row[i]; });
}

// out [T, H] = gain [H] ⊙ x [T, H] / sqrt(mean(x²) + eps), and rounded. Grid: T.
KERNEL(rms_norm, const float* x, const float* gain, float* out, bf16* rounded, u32 hidden, float eps) {
    u64 first = u64{blockIdx.x} * hidden;
    float factor = norm_factor(x + first, hidden, eps);
    for_row(hidden, [=](u32 i) {
        float value = gain[i] * (x[first + i] * factor);
        out[first + i] = value;
        rounded[first + i] = to_bf16(value);
    });
}

// slots [S, H] at into [N] = their sum with those at from [N], rounded. No slot is named twice. Grid: N.
KERNEL(add_slots, bf16* slots, const u32* into, const u32* from, u32 hidden) {
    bf16* sum = slots + u64{into[blockIdx.x]} * hidden;
    const bf16* other = slots + u64{from[blockIdx.x]} * hidden;
    for_row(hidden, [=](u32 i) { sum[i] = to_bf16(to_float(sum[i]) + to_float(other[i])); });
}

// out [P, H] = x [R, H] at rows [P]. Grid: P.
KERNEL(gather_bf16, const bf16* x, const u32* rows, bf16* out, u32 hidden) {
    const bf16* row = x + u64{rows[blockIdx.x]} * hidden;
    for_row(hidden, [=](u32 i) { out[u64{blockIdx.x} * hidden + i] = row[i]; });
}

// out [S, H]: slot s is the sum over the pairs p = pairs[first[s]..first[s + 1]], in this order, of weights[p] · y[p],
// rounded. y [P, H]; first [S + 1]. Grid: S.
KERNEL(combine_pairs, const float* y, const float* weights, const u32* first, const u32* pairs, bf16* out, u32 hidden) {
    u32 begin = first[blockIdx.x], end = first[blockIdx.x + 1];
    for_row(hidden, [=](u32 i) {
        float sum = 0.0f;
        for (u32 at = begin; at < end; at++) sum += weights[pairs[at]] * y[u64{pairs[at]} * hidden + i];
        out[u64{blockIdx.x} * hidden + i] = to_bf16(sum);
    });
}
