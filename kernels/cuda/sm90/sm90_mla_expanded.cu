// Entry of mla_expanded.cuh. Blocks of 384 threads, one a multiprocessor, for 128 rows of a head each; dynamic shared memory:
// 213064 bytes. Grid: (128s of rows, heads).
//
// Tensor maps lie in device memory, written by the host; arguments are their addresses (struct Attention).
#include "mla_expanded.cuh"

using namespace conclave::sm90;

KERNEL_BOUNDS(sm90_mla_expanded, (384, 1), const TensorMap* q, const TensorMap* kv, const TensorMap* cache, const u32* blocks,
              float* sums, u32 position, u32 first, u32 count, u32 rows, u32 heads, u32 fresh, float scale) {
    static_assert(expanded::Memory::SHARED == 213064);
    expanded::attend(expanded::Attention{q, kv, cache, blocks, sums, position, first, count, rows, heads, fresh != 0, scale});
}
