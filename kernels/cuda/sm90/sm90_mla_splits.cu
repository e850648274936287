// Entry of mla_splits.cuh: decode (64 heads of one row an item) and prefill (64 / heads rows of one sequence an item) alike.
// Blocks of 384 threads, one a multiprocessor; dynamic shared memory: 229760 bytes.
//
// Tensor maps lie in device memory, written by the host; arguments are their addresses (struct Mla). Every item has at least
// one key.
#include "mla_splits.cuh"

using namespace conclave::sm90;

KERNEL_BOUNDS(sm90_mla_splits, (384, 1), const TensorMap* q, const TensorMap* cache, const MlaItem* items, const u32* keys,
              const u32* first_block, const u32* blocks, float* out, u32 item_count, u32 heads, u32 splits, float scale) {
    static_assert(MlaMemory::SHARED == 229760);
    mla_splits(Mla{q, cache, items, keys, first_block, blocks, out, item_count, heads, splits, scale});
}
