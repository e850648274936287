// What every kernel includes: element types and the words of a kernel, under nvcc and under the shim (g++).
#pragma once

#ifdef __CUDACC__

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp8.h>

// A kernel that the host finds by its name.
#define KERNEL(name, ...) extern "C" __global__ void name(__VA_ARGS__)
// The same with __launch_bounds__(threads, blocks a multiprocessor), given in parentheses.
#define KERNEL_BOUNDS(name, bounds, ...) extern "C" __global__ void __launch_bounds__ bounds name(__VA_ARGS__)
// An array in shared memory, its extents in brackets: SHARED(float, tile, [16][33]);
#define SHARED(type, name, extents) __shared__ type name extents

// The shared memory whose size the launch gives.
__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char conclave_dynamic_shared[];
    return conclave_dynamic_shared;
}

#else
#include "shim/cuda.h"
#endif

using u32 = uint32_t;
using u64 = uint64_t;
using bf16 = __nv_bfloat16;
using e4m3 = __nv_fp8_e4m3;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(e4m3 x) { return static_cast<float>(x); }

// The bits of x as e4m3: to nearest, ties to even; beyond the largest magnitude, that one.
__device__ __forceinline__ uint8_t e4m3_bits(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

#ifdef __CUDACC__
// CUDA has it for another type of the same size.
__device__ __forceinline__ u64 atomicAdd(u64* at, u64 value) {
    return ::atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
}
#endif

// To nearest, ties to even.
__device__ __forceinline__ bf16 to_bf16(float x) { return __float2bfloat16_rn(x); }
// The value that x has once it went through bf16.
__device__ __forceinline__ float round_to_bf16(float x) { return to_float(to_bf16(x)); }

__host__ __device__ constexpr u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }
