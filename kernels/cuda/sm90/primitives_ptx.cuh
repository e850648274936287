// The primitives as PTX for sm_90a. Meanings: see primitives.cuh.
#pragma once

#include <cstdint>

#include "wgmma_ptx.cuh"

namespace conclave::sm90 {

/// Address within shared memory.
__device__ __forceinline__ uint32_t shared_offset(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// === Barriers ===

__device__ __forceinline__ void barrier_init(Barrier* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_offset(barrier)), "r"(arrivals) : "memory");
}

/// Makes initialised barriers visible to the copy engine; a `__syncthreads` has to follow.
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_offset(barrier)) : "memory");
}

/// Arrives, and has the phase wait for `bytes` of tile loads.
__device__ __forceinline__ void barrier_expect(Barrier* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_offset(barrier)), "r"(bytes) : "memory");
}

/// Waits until the phase of this parity is complete.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nwait_again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra wait_again;\n}\n" ::"r"(shared_offset(barrier)),
        "r"(parity)
        : "memory");
}

// === Tile loads ===

/// Orders this thread's tile loads after the host's writes of the map.
__device__ __forceinline__ void map_acquire(const TensorMap* map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(map) : "memory");
}

template <Keep KEEP>
__device__ __forceinline__ uint64_t cache_policy() {
    uint64_t policy;
    if constexpr (KEEP == Keep::First) {
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    } else if constexpr (KEEP == Keep::Last) {
        asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    } else {
        asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    }
    return policy;
}

/// Starts the load of the map's tile at element (x, y); `barrier` counts its bytes. Elements out of bounds become zero.
template <Keep KEEP = Keep::Normal>
__device__ __forceinline__ void tile_load(void* tile, const TensorMap* map, Barrier* barrier, int32_t x, int32_t y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_offset(tile)),
        "l"(map), "r"(shared_offset(barrier)), "r"(x), "r"(y), "l"(cache_policy<KEEP>())
        : "memory");
}

/// The same for a map of four dimensions.
template <Keep KEEP = Keep::Normal>
__device__ __forceinline__ void tile_load(
    void* tile, const TensorMap* map, Barrier* barrier, int32_t x, int32_t y, int32_t z, int32_t w) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_offset(tile)),
        "l"(map), "r"(shared_offset(barrier)), "r"(x), "r"(y), "r"(z), "r"(w), "l"(cache_policy<KEEP>())
        : "memory");
}

/// Makes this thread's plain writes to shared memory visible to products and tile loads.
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// === Products ===

/// Before the first product, and wherever registers of a product were written by other means.
__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

/// Closes a group of products.
__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Waits until at most `PENDING` groups are unfinished, for this warp.
template <int PENDING>
__device__ __forceinline__ void product_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/// Keeps the compiler from moving uses of a product's registers across this point.
template <int N>
__device__ __forceinline__ void product_pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int COUNT>
__device__ __forceinline__ void registers_raise() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void registers_lower() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// === Arithmetic ===

/// Two floats rounded to bf16 (nearest even), `low` in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

/// Two floats rounded to e4m3 (nearest even, saturating), `low` in the low byte.
__device__ __forceinline__ uint16_t pack_e4m3(float low, float high) {
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

/// 2 to the power `x`, within 2 ulp; 0 for minus infinity.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// 1 / x, within 1 ulp; 0 for infinity.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace conclave::sm90
