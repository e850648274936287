// Operations on each element by itself.
#pragma once

#include "math.cuh"

// Calls `operation(i)` for each i below n that this thread has. Grid: any.
template <class Operation>
__device__ __forceinline__ void for_each(u64 n, Operation operation) {
    u64 step = u64{gridDim.x} * blockDim.x;
    for (u64 i = u64{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += step) operation(i);
}
