// The CUDA types that kernels use, as plain C++: vectors, bf16 and FP8 e4m3.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct dim3 {
    uint32_t x, y, z;
};

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline double __longlong_as_double(long long bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// The upper half of an IEEE single.
struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t bits = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// One sign, four exponent (bias 7), three mantissa bits; no infinities; all ones below the sign is NaN.
struct __nv_fp8_e4m3 {
    uint8_t bits;

    explicit operator float() const {
        uint32_t sign = uint32_t{bits} >> 7 << 31, exponent = bits >> 3 & 15, mantissa = bits & 7;
        if (exponent == 15 && mantissa == 7) return __uint_as_float(sign | 0x7fffffff);
        float magnitude = exponent == 0 ? mantissa * 0x1p-9f
                                        : __uint_as_float((exponent + 127 - 7) << 23 | mantissa << 20);
        return sign ? -magnitude : magnitude;
    }
};

enum __nv_saturation_t { __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3 };

// Nearest even.
inline uint8_t __nv_cvt_float_to_fp8(float x, __nv_saturation_t, __nv_fp8_interpretation_t) {
    if (x != x) return 0x7f;
    uint8_t sign = std::signbit(x) ? 0x80 : 0;
    float magnitude = std::fmin(std::fabs(x), 448.0f);
    int exponent = magnitude < 0x1p-6f ? -6 : std::ilogb(magnitude);
    auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));
    return sign | static_cast<uint8_t>(steps + (static_cast<uint32_t>(exponent + 6) << 3));
}
