// Entries of grouped_linear.cuh, one for each number of tokens a tile. Blocks of 128 · (1 + warpgroups) threads, as many as fit
// the chip; dynamic shared memory: the last number of each row below.
//
// Tensor maps lie in device memory, written by the host; arguments are their addresses (struct Grouped).
#include "grouped_linear.cuh"

using namespace conclave::sm90;

// y f32 [P, outputs]
#define LINEAR(tokens, warpgroups, stages, blocks, shared)                                                                \
    KERNEL_BOUNDS(sm90_grouped_linear_##tokens, (128 * (1 + warpgroups), blocks), const TensorMap* x, const u64* weights, \
                  const u32* begin, const u32* end, float* y, u32 rows, u32 groups, u32 inner, u32 outputs) {             \
        Grouped grouped{x, nullptr, weights, nullptr, nullptr, begin, end, rows, groups, inner, outputs};                 \
        using S = Shape<tokens, warpgroups, stages, false, false>;                                                        \
        static_assert(S::SHARED == shared);                                                                               \
        grouped_linear<S>(grouped, y);                                                                                    \
    }

// y bf16 [P, outputs] = round(silu(gate) ⊙ up)
#define GATED(tokens, warpgroups, stages, blocks, shared)                                                                 \
    KERNEL_BOUNDS(sm90_grouped_gated_##tokens, (128 * (1 + warpgroups), blocks), const TensorMap* x, const u64* weights,  \
                  const u32* begin, const u32* end, u16* y, u32 rows, u32 groups, u32 inner, u32 outputs) {               \
        Grouped grouped{x, nullptr, weights, nullptr, nullptr, begin, end, rows, groups, inner, outputs};                 \
        using S = Shape<tokens, warpgroups, stages, true, false>;                                                         \
        static_assert(S::SHARED == shared);                                                                               \
        grouped_linear<S>(grouped, y);                                                                                    \
    }

LINEAR(16, 1, 8, 2, 86148)
LINEAR(64, 1, 6, 2, 102500)
LINEAR(128, 2, 6, 1, 200804)
LINEAR(256, 2, 4, 1, 200772)

GATED(16, 1, 8, 2, 86148)
GATED(64, 1, 6, 2, 102500)
GATED(128, 2, 6, 1, 200804)
GATED(256, 2, 4, 1, 200772)
