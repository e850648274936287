// Warpgroup products (wgmma) in PTX, one function template a kind of operands; N = 16, 32, 64, 128, 256.
//
// An operand list of inline assembly has to be literal text, hence the lists of register numbers below.
#pragma once

#include <cstdint>

#define CONCLAVE_LIST_0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define CONCLAVE_LIST_1 "%8,%9,%10,%11,%12,%13,%14,%15"
#define CONCLAVE_LIST_2 "%16,%17,%18,%19,%20,%21,%22,%23"
#define CONCLAVE_LIST_3 "%24,%25,%26,%27,%28,%29,%30,%31"
#define CONCLAVE_LIST_4 "%32,%33,%34,%35,%36,%37,%38,%39"
#define CONCLAVE_LIST_5 "%40,%41,%42,%43,%44,%45,%46,%47"
#define CONCLAVE_LIST_6 "%48,%49,%50,%51,%52,%53,%54,%55"
#define CONCLAVE_LIST_7 "%56,%57,%58,%59,%60,%61,%62,%63"
#define CONCLAVE_LIST_8 "%64,%65,%66,%67,%68,%69,%70,%71"
#define CONCLAVE_LIST_9 "%72,%73,%74,%75,%76,%77,%78,%79"
#define CONCLAVE_LIST_10 "%80,%81,%82,%83,%84,%85,%86,%87"
#define CONCLAVE_LIST_11 "%88,%89,%90,%91,%92,%93,%94,%95"
#define CONCLAVE_LIST_12 "%96,%97,%98,%99,%100,%101,%102,%103"
#define CONCLAVE_LIST_13 "%104,%105,%106,%107,%108,%109,%110,%111"
#define CONCLAVE_LIST_14 "%112,%113,%114,%115,%116,%117,%118,%119"
#define CONCLAVE_LIST_15 "%120,%121,%122,%123,%124,%125,%126,%127"
#define CONCLAVE_TEXT_16 CONCLAVE_LIST_0
#define CONCLAVE_TEXT_32 CONCLAVE_LIST_0 "," CONCLAVE_LIST_1
#define CONCLAVE_TEXT_64 CONCLAVE_LIST_0 "," CONCLAVE_LIST_1 "," CONCLAVE_LIST_2 "," CONCLAVE_LIST_3
#define CONCLAVE_TEXT_128 CONCLAVE_LIST_0 "," CONCLAVE_LIST_1 "," CONCLAVE_LIST_2 "," CONCLAVE_LIST_3 "," CONCLAVE_LIST_4 "," CONCLAVE_LIST_5 "," CONCLAVE_LIST_6 "," CONCLAVE_LIST_7
#define CONCLAVE_TEXT_256 CONCLAVE_LIST_0 "," CONCLAVE_LIST_1 "," CONCLAVE_LIST_2 "," CONCLAVE_LIST_3 "," CONCLAVE_LIST_4 "," CONCLAVE_LIST_5 "," CONCLAVE_LIST_6 "," CONCLAVE_LIST_7 "," CONCLAVE_LIST_8 "," CONCLAVE_LIST_9 "," CONCLAVE_LIST_10 "," CONCLAVE_LIST_11 "," CONCLAVE_LIST_12 "," CONCLAVE_LIST_13 "," CONCLAVE_LIST_14 "," CONCLAVE_LIST_15

#define CONCLAVE_OUT_8(d, i)                                                                                              \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define CONCLAVE_OUT_16(d) CONCLAVE_OUT_8(d, 0)
#define CONCLAVE_OUT_32(d) CONCLAVE_OUT_8(d, 0), CONCLAVE_OUT_8(d, 8)
#define CONCLAVE_HALF_64(d, i) CONCLAVE_OUT_8(d, i), CONCLAVE_OUT_8(d, i + 8), CONCLAVE_OUT_8(d, i + 16), CONCLAVE_OUT_8(d, i + 24)
#define CONCLAVE_OUT_64(d) CONCLAVE_HALF_64(d, 0)
#define CONCLAVE_OUT_128(d) CONCLAVE_HALF_64(d, 0), CONCLAVE_HALF_64(d, 32)
#define CONCLAVE_OUT_256(d) CONCLAVE_OUT_128(d), CONCLAVE_HALF_64(d, 64), CONCLAVE_HALF_64(d, 96)

// `A`, `B`, `P`: numbers of the operands after the N / 2 registers of the product; `TAIL`: signs and majors.
#define CONCLAVE_PRODUCT(N, SHAPE, A, B, P, TAIL, ...)                                                                    \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P ", 0;\nwgmma.mma_async.sync.aligned." SHAPE " {" CONCLAVE_TEXT_##N  \
                 "}, " A ", %" B ", p, 1, 1" TAIL ";\n}\n"                                                                \
                 : CONCLAVE_OUT_##N(d)                                                                                    \
                 : __VA_ARGS__)

namespace conclave::sm90 {

/// `d [64, N] (+)= a [64, 16] · b [N, 16]ᵀ`, bf16, both K-major in shared memory.
template <int N>
__device__ __forceinline__ void product_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
    if constexpr (N == 16) {
        CONCLAVE_PRODUCT(16, "m64n16k16.f32.bf16.bf16", "%8", "9", "10", ", 0, 0", "l"(a), "l"(b), "r"(int(add)));
    } else if constexpr (N == 32) {
        CONCLAVE_PRODUCT(32, "m64n32k16.f32.bf16.bf16", "%16", "17", "18", ", 0, 0", "l"(a), "l"(b), "r"(int(add)));
    } else if constexpr (N == 64) {
        CONCLAVE_PRODUCT(64, "m64n64k16.f32.bf16.bf16", "%32", "33", "34", ", 0, 0", "l"(a), "l"(b), "r"(int(add)));
    } else if constexpr (N == 128) {
        CONCLAVE_PRODUCT(128, "m64n128k16.f32.bf16.bf16", "%64", "65", "66", ", 0, 0", "l"(a), "l"(b), "r"(int(add)));
    } else {
        static_assert(N == 256);
        CONCLAVE_PRODUCT(256, "m64n256k16.f32.bf16.bf16", "%128", "129", "130", ", 0, 0", "l"(a), "l"(b), "r"(int(add)));
    }
}

/// The same with `b [16, N]` N-major.
template <int N>
__device__ __forceinline__ void product_bf16_columns(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
    if constexpr (N == 64) {
        CONCLAVE_PRODUCT(64, "m64n64k16.f32.bf16.bf16", "%32", "33", "34", ", 0, 1", "l"(a), "l"(b), "r"(int(add)));
    } else if constexpr (N == 128) {
        CONCLAVE_PRODUCT(128, "m64n128k16.f32.bf16.bf16", "%64", "65", "66", ", 0, 1", "l"(a), "l"(b), "r"(int(add)));
    } else {
        static_assert(N == 256);
        CONCLAVE_PRODUCT(256, "m64n256k16.f32.bf16.bf16", "%128", "129", "130", ", 0, 1", "l"(a), "l"(b), "r"(int(add)));
    }
}

/// The same with `a` in registers and `b [16, N]` N-major.
template <int N>
__device__ __forceinline__ void product_bf16_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
    if constexpr (N == 64) {
        CONCLAVE_PRODUCT(64, "m64n64k16.f32.bf16.bf16", "{%32,%33,%34,%35}", "36", "37", ", 1", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
    } else if constexpr (N == 128) {
        CONCLAVE_PRODUCT(128, "m64n128k16.f32.bf16.bf16", "{%64,%65,%66,%67}", "68", "69", ", 1", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
    } else {
        static_assert(N == 256);
        CONCLAVE_PRODUCT(256, "m64n256k16.f32.bf16.bf16", "{%128,%129,%130,%131}", "132", "133", ", 1", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
    }
}

/// `d [64, N] (+)= a [64, 32] · b [N, 32]ᵀ`, e4m3, both K-major in shared memory.
template <int N>
__device__ __forceinline__ void product_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
    if constexpr (N == 16) {
        CONCLAVE_PRODUCT(16, "m64n16k32.f32.e4m3.e4m3", "%8", "9", "10", "", "l"(a), "l"(b), "r"(int(add)));
    } else if constexpr (N == 32) {
        CONCLAVE_PRODUCT(32, "m64n32k32.f32.e4m3.e4m3", "%16", "17", "18", "", "l"(a), "l"(b), "r"(int(add)));
    } else if constexpr (N == 64) {
        CONCLAVE_PRODUCT(64, "m64n64k32.f32.e4m3.e4m3", "%32", "33", "34", "", "l"(a), "l"(b), "r"(int(add)));
    } else {
        static_assert(N == 128);
        CONCLAVE_PRODUCT(128, "m64n128k32.f32.e4m3.e4m3", "%64", "65", "66", "", "l"(a), "l"(b), "r"(int(add)));
    }
}

}  // namespace conclave::sm90
