// Buffers as the host allocates them: at multiples of 256, every byte 0xff at first, between guards that are looked at when
// the buffer is freed. Under AddressSanitizer, which watches the ends by itself, without guards.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef __SANITIZE_ADDRESS__
static constexpr size_t GUARD = 0;
#else
static constexpr size_t GUARD = 256;
#endif
static constexpr unsigned char GUARDED = 0xa5;

// Null if the system has not as much.
extern "C" void* conclave_shim_allocate(size_t bytes) {
    void* memory = nullptr;
    if (bytes > SIZE_MAX - 2 * GUARD - 1) return nullptr;
    if (posix_memalign(&memory, 256, std::max<size_t>(bytes + 2 * GUARD, 1)) != 0) return nullptr;
    unsigned char* start = static_cast<unsigned char*>(memory);
    memset(start, GUARDED, GUARD);
    memset(start + GUARD, 0xff, bytes);
    memset(start + GUARD + bytes, GUARDED, GUARD);
    return start + GUARD;
}

// 1, or 0 if somebody wrote outside the buffer.
extern "C" int conclave_shim_free(void* buffer, size_t bytes) {
    unsigned char* start = static_cast<unsigned char*>(buffer) - GUARD;
    auto whole = [](const unsigned char* guard) {
        return std::all_of(guard, guard + GUARD, [](unsigned char byte) { return byte == GUARDED; });
    };
    int intact = whole(start) && whole(start + GUARD + bytes);
    free(start);
    return intact;
}
