// Entry of quantize.cuh: blocks of 256 threads, ceil(rows · ceil(inner / 128) / 8) of them, no dynamic shared memory.
#include "quantize.cuh"

using namespace conclave::sm90;

KERNEL_BOUNDS(sm90_quantize, (256), const uint2* x, u32* out, float* scales, u32 rows, u32 inner, u32 pitch) {
    quantize(x, out, scales, rows, inner, pitch);
}
