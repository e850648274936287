// Activations for the FP8 products: e4m3 with a scale for each token and 128 elements.
#pragma once

#include "../fp8.cuh"
#include "primitives.cuh"

namespace conclave::sm90 {

/// One warp for each token and block of 128: four elements a lane. The scale is the largest magnitude / 448. Same bits as
/// `quantize` of `quantize.cu`.
///
/// `x` bf16 [P, inner], inner % 8 == 0; `out` e4m3 [P, inner]; `scales` f32 [ceil(inner / 128), pitch], pitch >= P.
__device__ __forceinline__ void quantize(const uint2* x, u32* out, float* scales, u32 rows, u32 inner, u32 pitch) {
    u32 blocks = ceil_div(inner, 128), warp = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (warp >= rows * blocks) return;
    u32 row = warp / blocks, block = warp % blocks, column = block * 32 + threadIdx.x % WARP;
    bool inside = column * 4 < inner;
    u64 at = u64(row) * (inner / 4) + column;
    uint2 pairs = inside ? x[at] : make_uint2(0, 0);
    float values[4] = {__uint_as_float(pairs.x << 16), __uint_as_float(pairs.x & 0xffff0000), __uint_as_float(pairs.y << 16),
                       __uint_as_float(pairs.y & 0xffff0000)};
    float largest = fmaxf(fmaxf(fabsf(values[0]), fabsf(values[1])), fmaxf(fabsf(values[2]), fabsf(values[3])));
    for (u32 lanes = 16; lanes > 0; lanes /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, lanes));
    RowScale of = row_scale(largest);
    u32 low = pack_e4m3(values[0] * of.inverse, values[1] * of.inverse);
    u32 high = pack_e4m3(values[2] * of.inverse, values[3] * of.inverse);
    if (inside) out[at] = low | high << 16;
    if (threadIdx.x % WARP == 0) scales[u64(block) * pitch + row] = of.scale;
}

}  // namespace conclave::sm90
