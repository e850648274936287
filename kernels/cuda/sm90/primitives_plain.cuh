// The primitives as plain C++ for the shim. Meanings: see primitives.cuh.
//
// What the chip does asynchronously happens here at a random later moment: a tile load when some thread waits, a product
// when its warp waits for its group at the latest, and until then its registers hold NaN. A kernel that reads too early or
// gives a stage back too early gets other results in some schedule.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

namespace conclave::sm90 {

__device__ __forceinline__ uint32_t shared_offset(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - dynamic_shared());
}

namespace plain {

/// The place of a byte under the 128-byte swizzle.
inline const unsigned char* swizzle(uint32_t offset) { return dynamic_shared() + (offset ^ (offset >> 7 & 7) << 4); }

inline float bf16_at(uint32_t offset) {
    uint16_t bits;
    memcpy(&bits, swizzle(offset), sizeof bits);
    return __uint_as_float(uint32_t{bits} << 16);
}

inline float e4m3_at(uint32_t offset) { return static_cast<float>(e4m3{*swizzle(offset)}); }

/// What a map's 128 bytes hold under the shim.
struct Map {
    const unsigned char* address;
    uint32_t dimensions, element, swizzled, unused;
    uint64_t size[4], stride[4];
    uint32_t tile[4];
};
static_assert(sizeof(Map) <= sizeof(TensorMap));

/// Copies the tile at `at` into shared memory; what is out of bounds becomes zero. Gives its bytes.
inline uint32_t copy_tile(unsigned char* tile, const Map& map, const int32_t (&at)[4]) {
    uint32_t rows = 1, row_bytes = map.tile[0] * map.element;
    for (uint32_t dimension = 1; dimension < map.dimensions; ++dimension) rows *= map.tile[dimension];
    uint32_t offset = shared_offset(tile);
    for (uint32_t row = 0; row < rows; ++row) {
        const unsigned char* from = map.address;
        bool inside = true;
        for (uint32_t dimension = 1, rest = row; dimension < map.dimensions; ++dimension) {
            int64_t place = int64_t{at[dimension]} + rest % map.tile[dimension];
            rest /= map.tile[dimension];
            inside = inside && place >= 0 && place < static_cast<int64_t>(map.size[dimension]);
            from += place * static_cast<int64_t>(map.stride[dimension]);
        }
        for (uint32_t byte = 0; byte < row_bytes; ++byte) {
            int64_t place = int64_t{at[0]} + byte / map.element;
            bool have = inside && place >= 0 && place < static_cast<int64_t>(map.size[0]);
            uint32_t to = offset + row * row_bytes + byte;
            if (map.swizzled) to ^= (to >> 7 & 7) << 4;
            dynamic_shared()[to] = have ? from[int64_t{at[0]} * map.element + byte] : 0;
        }
    }
    return rows * row_bytes;
}

/// An mbarrier's word: arrivals still awaited and in full, bytes still awaited, parity of the current phase.
struct Phase {
    int32_t bytes;
    uint16_t pending;
    uint16_t arrivals : 15;
    uint16_t parity : 1;
};
static_assert(sizeof(Phase) == sizeof(Barrier));

inline Phase& phase(Barrier* barrier) { return *reinterpret_cast<Phase*>(barrier); }

inline void complete(Phase& phase) {
    if (phase.pending > 0 || phase.bytes != 0) return;
    phase.pending = phase.arrivals;
    phase.parity ^= 1;
}

/// Tile loads on their way, in the order they were started. Blocks of one thread of the host run one after the other.
inline thread_local std::vector<std::function<void()>> loads;

inline void land_a_load() {
    if (loads.empty() || shim::random(4) != 0) return;
    size_t at = shim::random(static_cast<uint32_t>(loads.size()));
    std::function<void()> load = std::move(loads[at]);
    loads.erase(loads.begin() + static_cast<ptrdiff_t>(at));
    load();
}

/// Now and then keeps a thread back for long, so that the others run ahead of it as far as barriers let them.
inline void linger() {
    if (shim::random(256) != 0) return;
    for (uint32_t turns = shim::random(400); turns > 0; --turns) shim::yield();
}

/// A product begun by one thread: the registers as they were, and what is to be added to them.
struct Pending {
    uint32_t group;
    float* registers;
    uint32_t count;
    std::function<void(float*)> run;
};

struct Products {
    uint32_t group = 0;
    std::vector<Pending> pending;
    std::vector<std::pair<float*, std::vector<float>>> values;
};

inline Products& products() {
    static thread_local Products all[1024];
    return all[threadIdx.x];
}

/// Begins a product: its registers are NaN until it is done.
inline void begin(float* registers, uint32_t count, std::function<void(float*)> run) {
    Products& mine = products();
    bool known = false;
    for (auto& value : mine.values) known = known || value.first == registers;
    if (!known) {
        mine.values.push_back({registers, std::vector<float>(registers, registers + count)});
        std::fill(registers, registers + count, NAN);
    }
    mine.pending.push_back({mine.group, registers, count, std::move(run)});
}

/// Does the products of groups up to `last`, and hands over registers with none left.
inline void finish(Products& mine, uint32_t groups) {
    size_t done = 0;
    for (; done < mine.pending.size() && mine.pending[done].group < groups; ++done) {
        for (auto& value : mine.values) {
            if (value.first == mine.pending[done].registers) mine.pending[done].run(value.second.data());
        }
    }
    mine.pending.erase(mine.pending.begin(), mine.pending.begin() + static_cast<ptrdiff_t>(done));
    for (size_t at = 0; at < mine.values.size();) {
        auto& [registers, values] = mine.values[at];
        bool open = false;
        for (auto& pending : mine.pending) open = open || pending.registers == registers;
        if (open) {
            ++at;
            continue;
        }
        memcpy(registers, values.data(), values.size() * sizeof(float));
        mine.values.erase(mine.values.begin() + static_cast<ptrdiff_t>(at));
    }
}

struct Operand {
    uint32_t start, leading, stride;
};

inline Operand decode(uint64_t descriptor) {
    auto field = [&](int at) { return static_cast<uint32_t>(descriptor >> at & 0x3fff) << 4; };
    return {field(0), field(16), field(32)};
}

/// Offset of byte `byte` of row `row` of a K-major operand.
inline uint32_t along(const Operand& operand, uint32_t row, uint32_t byte) {
    return operand.start + row / 8 * operand.stride + row % 8 * ROW + byte;
}

/// Offset of (inner step `k`, column `n`) of an N-major operand of bf16.
inline uint32_t across(const Operand& operand, uint32_t k, uint32_t n) {
    return operand.start + n / 64 * operand.leading + k / 8 * operand.stride + k % 8 * ROW + n % 64 * 2;
}

/// Row of register `i` of a fragment for the calling thread, and column.
inline uint32_t fragment_row(uint32_t i) { return threadIdx.x % WARPGROUP / WARP * 16 + threadIdx.x % WARP / 4 + i / 2 % 2 * 8; }
inline uint32_t fragment_column(uint32_t i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

/// `K` steps for the calling thread's registers: `left(row half, k)`, `right(column, k)`.
template <int N, int K, class Left, class Right>
void multiply(float* d, bool add, Left left, Right right) {
    for (uint32_t column_register = 0; column_register < N / 4; ++column_register) {
        uint32_t first = column_register / 2 * 4 + column_register % 2, column = fragment_column(first);
        float sum[2] = {add ? d[first] : 0, add ? d[first + 2] : 0};
        for (uint32_t k = 0; k < K; ++k) {
            float b = right(column, k);
            sum[0] = std::fmaf(left(0, k), b, sum[0]);
            sum[1] = std::fmaf(left(1, k), b, sum[1]);
        }
        d[first] = sum[0];
        d[first + 2] = sum[1];
    }
}

}  // namespace plain

// === Barriers ===

inline void barrier_init(Barrier* barrier, uint32_t arrivals) {
    plain::phase(barrier) = {0, static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0};
}

inline void barrier_init_fence() {}

inline void barrier_expect(Barrier* barrier, uint32_t bytes) {
    plain::Phase& phase = plain::phase(barrier);
    phase.bytes += static_cast<int32_t>(bytes);
    --phase.pending;
    plain::complete(phase);
}

inline void barrier_arrive(Barrier* barrier) { barrier_expect(barrier, 0); }

inline void barrier_wait(Barrier* barrier, uint32_t parity) {
    while (plain::phase(barrier).parity == parity) {
        plain::land_a_load();
        shim::yield();
    }
    plain::linger();
}

// === Tile loads ===

inline void map_acquire(const TensorMap*) {}

template <Keep KEEP = Keep::Normal>
void tile_load(void* tile, const TensorMap* map, Barrier* barrier, int32_t x, int32_t y, int32_t z, int32_t w) {
    plain::loads.push_back([=] {
        const auto& plain_map = *reinterpret_cast<const plain::Map*>(map);
        plain::Phase& phase = plain::phase(barrier);
        phase.bytes -= static_cast<int32_t>(plain::copy_tile(static_cast<unsigned char*>(tile), plain_map, {x, y, z, w}));
        plain::complete(phase);
    });
}

template <Keep KEEP = Keep::Normal>
void tile_load(void* tile, const TensorMap* map, Barrier* barrier, int32_t x, int32_t y) {
    tile_load<KEEP>(tile, map, barrier, x, y, 0, 0);
}

inline void proxy_fence() {}

// === Products ===

inline void product_fence() {}
inline void product_commit() { ++plain::products().group; }

template <int PENDING>
void product_wait() {
    plain::linger();
    plain::Products& mine = plain::products();
    plain::finish(mine, mine.group - std::min<uint32_t>(mine.group, shim::random(2) ? 0 : PENDING));
    __syncwarp();
}

template <int N>
void product_pin(float (&)[N]) {}

template <int N>
void product_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
    plain::begin(d, N / 2, [=, left = plain::decode(a), right = plain::decode(b)](float* d) {
        uint32_t rows[2] = {plain::fragment_row(0), plain::fragment_row(2)};
        plain::multiply<N, 16>(
            d, add, [&](uint32_t half, uint32_t k) { return plain::bf16_at(plain::along(left, rows[half], k * 2)); },
            [&](uint32_t column, uint32_t k) { return plain::bf16_at(plain::along(right, column, k * 2)); });
    });
}

template <int N>
void product_bf16_columns(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
    plain::begin(d, N / 2, [=, left = plain::decode(a), right = plain::decode(b)](float* d) {
        uint32_t rows[2] = {plain::fragment_row(0), plain::fragment_row(2)};
        plain::multiply<N, 16>(
            d, add, [&](uint32_t half, uint32_t k) { return plain::bf16_at(plain::along(left, rows[half], k * 2)); },
            [&](uint32_t column, uint32_t k) { return plain::bf16_at(plain::across(right, k, column)); });
    });
}

template <int N>
void product_bf16_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
    std::vector<float> left(32);
    for (uint32_t k = 0; k < 16; ++k) {
        for (uint32_t half = 0; half < 2; ++half) {
            uint32_t pair = __shfl_sync(0xffffffff, a[k / 8 * 2 + half], threadIdx.x % WARP / 4 * 4 + k % 8 / 2);
            left[half * 16 + k] = __uint_as_float(pair >> k % 2 * 16 << 16);
        }
    }
    plain::begin(d, N / 2, [add, left, right = plain::decode(b)](float* d) {
        plain::multiply<N, 16>(
            d, add, [&](uint32_t half, uint32_t k) { return left[half * 16 + k]; },
            [&](uint32_t column, uint32_t k) { return plain::bf16_at(plain::across(right, k, column)); });
    });
}

template <int N>
void product_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
    plain::begin(d, N / 2, [=, left = plain::decode(a), right = plain::decode(b)](float* d) {
        uint32_t rows[2] = {plain::fragment_row(0), plain::fragment_row(2)};
        plain::multiply<N, 32>(
            d, add, [&](uint32_t half, uint32_t k) { return plain::e4m3_at(plain::along(left, rows[half], k)); },
            [&](uint32_t column, uint32_t k) { return plain::e4m3_at(plain::along(right, column, k)); });
    });
}

template <int COUNT>
void registers_raise() {}
template <int COUNT>
void registers_lower() {}

// === Arithmetic ===

inline uint32_t pack_bf16(float low, float high) {
    return uint32_t{__float2bfloat16_rn(low).bits} | uint32_t{__float2bfloat16_rn(high).bits} << 16;
}

/// Two floats rounded to e4m3 (nearest even, saturating), `low` in the low byte.
inline uint16_t pack_e4m3(float low, float high) {
    return static_cast<uint16_t>(e4m3_bits(low) | e4m3_bits(high) << 8);
}

inline float power_of_two(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }

}  // namespace conclave::sm90
