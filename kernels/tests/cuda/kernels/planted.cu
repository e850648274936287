// Kernels that are wrong on purpose, each in one way, and what the tests need to see the shim work.

#include "types.cuh"

// out [256] = x [256] in reverse. The barrier between writing and reading is missing if `barrier` is 0.
KERNEL(planted_missing_barrier, const float* x, float* out, u32 barrier) {
    SHARED(float, tile, [256]);
    tile[threadIdx.x] = x[threadIdx.x];
    if (barrier) __syncthreads();
    out[threadIdx.x] = tile[255 - threadIdx.x];
}

// out [32] = x [32] in reverse, within one warp.
KERNEL(planted_missing_warp_barrier, const float* x, float* out, u32 barrier) {
    SHARED(float, tile, [32]);
    tile[threadIdx.x] = x[threadIdx.x];
    if (barrier) __syncwarp();
    out[threadIdx.x] = tile[31 - threadIdx.x];
}

// Half of the threads come to a barrier of all.
KERNEL(planted_divergent_barrier, u32 named) {
    if (threadIdx.x >= 64) {
        if (named) shim::barrier(1, 96);
        return;
    }
    if (named) shim::barrier(1, 96);
    else if (threadIdx.x % 2 == 0) __syncthreads();
    else __syncwarp();
}

// Reads what no thread has written.
KERNEL(planted_unwritten_shared, float* out) {
    SHARED(float, tile, [32]);
    out[threadIdx.x] = tile[threadIdx.x] + reinterpret_cast<float*>(dynamic_shared())[threadIdx.x];
}

// Writes one element too many.
KERNEL(planted_overrun, float* out, u32 n) {
    if (threadIdx.x <= n) out[threadIdx.x] = 1.0f;
}

// Writes one element too many of a shared array.
KERNEL(planted_shared_overrun, float* out, u32 n) {
    SHARED(float, tile, [32]);
    if (threadIdx.x <= n) tile[threadIdx.x] = 1.0f;
    __syncthreads();
    if (threadIdx.x < n) out[threadIdx.x] = tile[threadIdx.x];
}

// Waits for a word that nobody writes, or that another thread writes.
KERNEL(planted_spin, u32* word, u32 written) {
    if (threadIdx.x == 0) {
        while (*static_cast<volatile u32*>(word) != 1) shim::yield();
    } else if (written) {
        *word = 1;
    }
}

// out [4, 32]: exchanges of the lanes of a warp.
KERNEL(exchanges, u32* out) {
    u32 lane = threadIdx.x;
    out[lane] = __shfl_xor_sync(0xffffffff, lane, 5);
    out[32 + lane] = __shfl_down_sync(0xffffffff, lane, 3);
    out[64 + lane] = __ballot_sync(0xffffffff, lane % 3 == 0);
    out[96 + lane] = lane < 16 ? __shfl_sync(0xffff, lane, 7) : __shfl_sync(0xffff0000, lane, 2, 8);
}
