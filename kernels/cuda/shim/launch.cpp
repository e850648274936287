// What the host calls: a kernel by its name, with arguments in memory.

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "block.h"

namespace shim {

static std::vector<Kernel>& kernels() {
    static std::vector<Kernel> all;
    return all;
}

Registration::Registration(Kernel kernel) { kernels().push_back(kernel); }

static const Kernel* find(const char* name) {
    for (auto& kernel : kernels()) {
        if (strcmp(kernel.name, name) == 0) return &kernel;
    }
    return nullptr;
}

// Empty, or why the kernel cannot be launched so.
static std::string check(const Kernel* kernel, const Launch& launch, const size_t* sizes, size_t count) {
    if (kernel == nullptr) return "not among the kernels that the shim was built from";
    if (count != kernel->count) {
        return "found " + std::to_string(count) + " arguments, expected " + std::to_string(kernel->count);
    }
    for (size_t at = 0; at < count; at++) {
        if (sizes[at] == kernel->sizes[at]) continue;
        return "argument " + std::to_string(at) + ": found " + std::to_string(sizes[at]) + " bytes, expected " +
               std::to_string(kernel->sizes[at]);
    }
    uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
    uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
    if (threads == 0 || threads > 1024 || launch.block.z > 64) {
        return "found a block of " + std::to_string(threads) + " threads, expected 1 to 1024";
    }
    if (blocks == 0 || launch.grid.x >> 31 || launch.grid.y > 65535 || launch.grid.z > 65535) {
        return "found a grid of " + std::to_string(launch.grid.x) + " x " + std::to_string(launch.grid.y) + " x " +
               std::to_string(launch.grid.z) + " blocks, expected at least 1, below 2^31 x 65536 x 65536";
    }
    if (launch.shared > 227 * 1024) return "found " + std::to_string(launch.shared) + " bytes of shared memory";
    return "";
}

// The blocks of a launch, one after the other in a random order.
static std::string run(const Launch& launch, uint64_t seed) {
    Random random(seed);
    std::vector<uint32_t> order(launch.grid.x * launch.grid.y * launch.grid.z);
    std::iota(order.begin(), order.end(), 0);
    for (uint32_t left = order.size(); left > 1; left--) std::swap(order[left - 1], order[random.below(left)]);
    for (uint32_t at : order) {
        uint32_t x = at % launch.grid.x, rest = at / launch.grid.x;
        Block block(launch, {x, rest % launch.grid.y, rest / launch.grid.y}, random);
        std::string error = block.run();
        if (!error.empty()) return error;
    }
    return "";
}

// Copies of the arguments at addresses that any type may have.
class Arguments {
public:
    Arguments(const void* const* arguments, const size_t* sizes, size_t count) {
        for (size_t at = 0; at < count; at++) {
            void* copy = nullptr;
            if (posix_memalign(&copy, 128, std::max<size_t>(sizes[at], 1)) != 0) abort();
            copies.push_back(memcpy(copy, arguments[at], sizes[at]));
        }
    }
    ~Arguments() {
        for (void* copy : copies) free(copy);
    }
    Arguments(const Arguments&) = delete;
    Arguments& operator=(const Arguments&) = delete;

    std::vector<void*> copies;
};

}  // namespace shim

// A launch as the host describes it.
struct ConclaveShimLaunch {
    const char* kernel;
    uint32_t grid[3], block[3];
    uint32_t shared;
    const void* const* arguments;
    const size_t* sizes;
    size_t count;
    // Decides the order of blocks, warps and lanes.
    uint64_t seed;
};

// Runs a launch to its end. 0, or 1 with `message` saying what went wrong.
extern "C" int conclave_shim_launch(const ConclaveShimLaunch* host, char* message, size_t length) {
    const shim::Kernel* kernel = shim::find(host->kernel);
    shim::Launch launch{kernel,
                        {host->grid[0], host->grid[1], host->grid[2]},
                        {host->block[0], host->block[1], host->block[2]},
                        host->shared,
                        nullptr};
    std::string error = shim::check(kernel, launch, host->sizes, host->count);
    if (error.empty()) {
        shim::Arguments arguments(host->arguments, host->sizes, host->count);
        launch.arguments = arguments.copies.data();
        error = shim::run(launch, host->seed);
    }
    if (length > 0) {
        size_t kept = std::min(error.size(), length - 1);
        memcpy(message, error.data(), kept);
        message[kept] = 0;
    }
    return error.empty() ? 0 : 1;
}
