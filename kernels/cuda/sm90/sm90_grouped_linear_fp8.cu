// Entries of grouped_linear_fp8.cuh; as those of sm90_grouped_linear.cu, with the scales beside the operands.
#include "grouped_linear_fp8.cuh"

using namespace conclave::sm90;

// y f32 [P, outputs]
#define LINEAR(tokens, warpgroups, stages, blocks, shared)                                                                \
    KERNEL_BOUNDS(sm90_grouped_linear_fp8_##tokens, (128 * (1 + warpgroups), blocks), const TensorMap* x,                 \
                  const TensorMap* x_scales, const u64* weights, const u64* scales, const u64* up_scales,                 \
                  const u32* begin, const u32* end, float* y, u32 rows, u32 groups, u32 inner, u32 outputs) {             \
        Grouped grouped{x, x_scales, weights, scales, up_scales, begin, end, rows, groups, inner, outputs};               \
        using S = Shape<tokens, warpgroups, stages, false, true>;                                                         \
        static_assert(S::SHARED == shared);                                                                               \
        grouped_linear_fp8<S>(grouped, y);                                                                                \
    }

// y bf16 [P, outputs] = round(silu(gate) ⊙ up)
#define GATED(tokens, warpgroups, stages, blocks, shared)                                                                 \
    KERNEL_BOUNDS(sm90_grouped_gated_fp8_##tokens, (128 * (1 + warpgroups), blocks), const TensorMap* x,                  \
                  const TensorMap* x_scales, const u64* weights, const u64* scales, const u64* up_scales,                 \
                  const u32* begin, const u32* end, u16* y, u32 rows, u32 groups, u32 inner, u32 outputs) {               \
        Grouped grouped{x, x_scales, weights, scales, up_scales, begin, end, rows, groups, inner, outputs};               \
        using S = Shape<tokens, warpgroups, stages, true, true>;                                                          \
        static_assert(S::SHARED == shared);                                                                               \
        grouped_linear_fp8<S>(grouped, y);                                                                                \
    }

LINEAR(16, 1, 8, 2, 87172)
LINEAR(64, 1, 6, 2, 104036)
LINEAR(128, 2, 6, 1, 203876)

GATED(16, 1, 8, 2, 87172)
GATED(64, 1, 6, 2, 104036)
GATED(128, 2, 6, 1, 203876)
