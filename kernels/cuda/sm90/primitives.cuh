// The hardware primitives of sm_90a that the fast kernels stand on: TMA tile loads, mbarriers, warpgroup products.
//
// Two versions with one meaning: PTX for the chip, plain C++ (under the shim) which computes the same from the same
// swizzled shared memory into the same register fragments, so that the kernels' pipelines, indices and masks run on a
// CPU. Kernels use nothing else of the chip.
//
// Shared memory of an operand tile: rows of 128 bytes (64 bf16 or 128 e4m3), rows in groups of eight (1024 bytes, aligned
// to 1024), the 16-byte pieces of row `r` permuted by `piece ^ (r % 8)`: the 128-byte swizzle of TMA and of wgmma.
//
// Fragment of a product [64, N] over the 128 threads of a warpgroup, `row = 16·warp + lane / 4`, `column = 2·(lane % 4)`:
//   d[4j], d[4j + 1]      row,     columns 8j + column, 8j + column + 1
//   d[4j + 2], d[4j + 3]  row + 8, the same columns
// Fragment of a left operand [64, 16] in registers, two bf16 a register:
//   a[0] row, k column..; a[1] row + 8, k column..; a[2] row, k column + 8..; a[3] row + 8, k column + 8..
#pragma once

#include <cstdint>

#include "../types.cuh"

namespace conclave::sm90 {

using i32 = int32_t;
using u16 = uint16_t;

/// An mbarrier in shared memory.
struct Barrier {
    uint64_t word;
};

/// A tensor map in device memory, written by the host; kernels take its address.
struct alignas(128) TensorMap {
    uint64_t words[16];
};

/// How long the second-level cache should keep what a tile load brings.
enum class Keep { Normal, First, Last };

constexpr uint32_t WARP = 32;
constexpr uint32_t WARPGROUP = 128;
/// Bytes of one row of an operand tile.
constexpr uint32_t ROW = 128;
/// Alignment of operand tiles.
constexpr uint32_t TILE_ALIGNMENT = 1024;
/// Bytes of one step of a product in the inner dimension: 16 bf16 or 32 e4m3.
constexpr uint32_t STEP = 32;

/// Descriptor bits for the 128-byte swizzle, groups of eight rows 1024 bytes apart.
constexpr uint64_t SWIZZLE_128 = uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32;

}  // namespace conclave::sm90

#ifdef __CUDACC__
#include "primitives_ptx.cuh"
#else
#include "primitives_plain.cuh"
#endif

namespace conclave::sm90 {

/// Descriptor of an operand whose rows run along the inner dimension (K-major), at `tile` in shared memory.
__device__ __forceinline__ uint64_t operand(const void* tile) {
    return SWIZZLE_128 | uint64_t(1) << 16 | shared_offset(tile) >> 4;
}

/// Descriptor of a right operand whose rows run along its columns (N-major): 64 columns a tile, tiles `stride` bytes apart;
/// rows are steps of the inner dimension.
__device__ __forceinline__ uint64_t operand_columns(const void* tile, uint32_t stride) {
    return SWIZZLE_128 | uint64_t(stride >> 4) << 16 | shared_offset(tile) >> 4;
}

/// The descriptor `bytes` further on.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

/// Byte of element piece `byte` (0..128) of row `row` within a swizzled tile.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t byte) { return row * ROW + (byte ^ (row % 8) * 16); }

/// Place of a ring of stages: index and parity of the current turn.
struct Ring {
    uint32_t stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void next(uint32_t stages) {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

}  // namespace conclave::sm90
