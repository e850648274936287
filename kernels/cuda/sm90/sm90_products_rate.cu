// Entry of products_rate.cuh: blocks of 256 threads, one a multiprocessor; dynamic shared memory: 49152 bytes.
#include "products_rate.cuh"

using namespace conclave::sm90;

// `rounds` times 2 · 64 · 256 · 64 multiply-adds a block, and a word a thread to out [threads].
KERNEL_BOUNDS(sm90_rate_products, (256, 1), float* out, u32 rounds) {
    static_assert(RATE_SHARED == 49152);
    out[blockIdx.x * 256 + threadIdx.x] = multiply_rounds(rounds);
}
