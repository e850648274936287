#include "rates.cuh"

// Reads x [n] and writes a word a thread to out [threads]. Grid: any.
KERNEL_BOUNDS(rate_reads, (RATE_THREADS), const uint4* x, u32* out, u64 n) {
    out[blockIdx.x * RATE_THREADS + threadIdx.x] = read_all(x, n);
}

// `rounds` times CHAINS multiply-adds of f32 a thread, and a word of each to out [threads]. Grid: any.
KERNEL_BOUNDS(rate_multiply_adds, (RATE_THREADS), float* out, u32 rounds) {
    out[blockIdx.x * RATE_THREADS + threadIdx.x] = add_products(rounds);
}
