#include "fp8.cuh"
#include "math.cuh"

// out e4m3 [rows, inner] = x bf16 [rows, inner] in units of scales f32 [ceil(inner / width), pitch], one for each row and
// `width` columns; pitch >= rows. A warp for each scale: ceil(rows · ceil(inner / width) / 8) blocks.
KERNEL_BOUNDS(quantize, (256), const bf16* x, uint8_t* out, float* scales, u32 rows, u32 inner, u32 width, u32 pitch) {
    u32 blocks = ceil_div(inner, width), warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (warp >= rows * blocks) return;
    u32 row = warp / blocks, block = warp % blocks, last = min((block + 1) * width, inner);
    u64 first = u64{row} * inner;
    float largest = 0.0f;
    for (u32 k = block * width + lane; k < last; k += 32) largest = fmaxf(largest, fabsf(to_float(x[first + k])));
    RowScale of = row_scale(warp_max(largest));
    for (u32 k = block * width + lane; k < last; k += 32) out[first + k] = e4m3_bits(to_float(x[first + k]) * of.inverse);
    if (lane == 0) scales[u64{block} * pitch + row] = of.scale;
}
