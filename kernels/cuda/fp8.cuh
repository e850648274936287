// FP8 e4m3: how activations are rounded to it, with a scale for each row and some columns.
#pragma once

#include "types.cuh"

// Largest magnitude of e4m3.
constexpr float E4M3_MAX = 448.0f;
// Blocks of smaller values have the scale of this one, as in the model's own inference code.
constexpr float SMALLEST = 1e-4f;

// What rounded values are multiplied by, and values before they are rounded.
struct RowScale {
    float scale, inverse;
};

// For values of at most this magnitude. One that is not a number stays so, and so does infinity.
__device__ __forceinline__ RowScale row_scale(float largest) {
    float reached = fmaxf(largest, SMALLEST);
    return {reached / E4M3_MAX, E4M3_MAX / reached};
}
