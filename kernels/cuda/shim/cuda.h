// CUDA C++ for g++: the words, indices, barriers and warp exchanges that the kernels of this project use.
//
// Each CUDA thread of a block is a fibre, and fibres change over only where one waits. The order in which they run, and
// that of blocks, is drawn from the seed of the launch, so that a missing barrier shows as a wrong result for some seeds.
// Memory is real memory: under AddressSanitizer a read or write past a buffer or shared array ends the program.
#pragma once

#define CONCLAVE_SHIM 1

#include <cmath>
#include <cstddef>
#include <type_traits>
#include <utility>

#include "types.h"

#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__

extern __thread dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

// A kernel by its name. `sizes` are those of its `count` parameters; `call` runs one thread of it.
struct Kernel {
    const char* name;
    const size_t* sizes;
    size_t count;
    void (*call)(const void* const* arguments);
};

struct Registration {
    explicit Registration(Kernel kernel);
};

template <auto F>
struct Entry;

template <class... P, void (*F)(P...)>
struct Entry<F> {
    static constexpr size_t sizes[] = {sizeof(P)..., 0};

    static void call(const void* const* arguments) { unpack(arguments, std::index_sequence_for<P...>{}); }

    template <size_t... I>
    static void unpack([[maybe_unused]] const void* const* arguments, std::index_sequence<I...>) {
        F(*static_cast<const P*>(arguments[I])...);
    }

    static Kernel kernel(const char* name) { return {name, sizes, sizeof...(P), call}; }
};

// Lets other fibres run: for loops that wait for a word of memory.
void yield();
// A number below `bound`, from the seed of the launch.
uint32_t random(uint32_t bound);
// Waits until `threads` threads of the block have come to barrier `id` (1 to 15).
void barrier(uint32_t id, uint32_t threads);
// Waits for the lanes of `mask`, then gives the value that `lane` brought.
uint64_t exchange(uint32_t mask, uint64_t value, uint32_t lane);
// Waits for the lanes of `mask`, then gives the lanes whose vote is true.
uint32_t ballot(uint32_t mask, bool vote);
// Shared memory of this block for the declaration `site`: the same for all its threads, every byte 0xff at first.
void* shared(const void* site, size_t bytes, size_t alignment);

// Which lane of its warp a thread is.
inline uint32_t lane() { return ((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x) % 32; }

template <class T>
T shuffle(uint32_t mask, T value, uint32_t from) {
    static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = exchange(mask, bits, from);
    memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace shim

#define KERNEL(name, ...)                                                                  \
    static void name(__VA_ARGS__);                                                         \
    static const shim::Registration registration_of_##name(shim::Entry<&name>::kernel(#name)); \
    static void name(__VA_ARGS__)
#define KERNEL_BOUNDS(name, bounds, ...) KERNEL(name, __VA_ARGS__)

#define SHARED(type, name, extents)                    \
    using type_of_##name = type extents;               \
    static const char site_of_##name = 0;              \
    type_of_##name& name = *static_cast<type_of_##name*>( \
        shim::shared(&site_of_##name, sizeof(type_of_##name), alignof(type_of_##name)))

unsigned char* dynamic_shared();
void __syncthreads();
inline void __syncwarp(uint32_t mask = 0xffffffff) { shim::ballot(mask, false); }
inline uint32_t __ballot_sync(uint32_t mask, bool vote) { return shim::ballot(mask, vote); }
inline bool __any_sync(uint32_t mask, bool vote) { return shim::ballot(mask, vote) != 0; }
inline bool __all_sync(uint32_t mask, bool vote) { return shim::ballot(mask, !vote) == 0; }

template <class T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32) {
    uint32_t first = shim::lane() / width * width;
    return shim::shuffle(mask, value, first + static_cast<uint32_t>(from) % width);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32) {
    uint32_t lane = shim::lane(), from = lane ^ lanes;
    return shim::shuffle(mask, value, from / width == lane / width ? from : lane);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, uint32_t lanes, int width = 32) {
    uint32_t lane = shim::lane(), from = lane + lanes;
    return shim::shuffle(mask, value, from / width == lane / width ? from : lane);
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, uint32_t lanes, int width = 32) {
    uint32_t lane = shim::lane();
    return shim::shuffle(mask, value, lane % width >= lanes ? lane - lanes : lane);
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
template <class A>
A min(A a, A b) { return b < a ? b : a; }
template <class A>
A max(A a, A b) { return a < b ? b : a; }
// Fibres change over only where one waits.
template <class A>
A atomicAdd(A* at, A value) { return std::exchange(*at, *at + value); }
