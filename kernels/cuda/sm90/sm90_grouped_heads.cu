// Entry of grouped_linear.cuh for products with a matrix a head: `y [rows, heads, width]`, of which the first outputs, is each
// head's `x [rows, heads, inner]` times its matrix, rounded. Blocks of 384 threads, one a multiprocessor; dynamic shared memory:
// 200804 bytes.
#include "grouped_linear.cuh"

using namespace conclave::sm90;

KERNEL_BOUNDS(sm90_grouped_heads_128, (384, 1), const TensorMap* x, const u64* weights, u16* y, u32 rows, u32 heads, u32 inner,
              u32 outputs, u32 width) {
    Grouped grouped{x, nullptr, weights, nullptr, nullptr, nullptr, nullptr, rows, heads, inner, outputs, width};
    using S = Shape<128, 2, 6, false, false, true>;
    static_assert(S::SHARED == 200804);
    grouped_linear<S>(grouped, y);
}
