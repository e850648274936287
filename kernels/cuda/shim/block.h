// One block of a launch: its threads as fibres, its barriers and its shared memory.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda.h"
#include "fibre.h"

namespace shim {

// Numbers that decide the order of things (splitmix64).
class Random {
public:
    explicit Random(uint64_t seed) : state(seed) {}
    uint32_t below(uint32_t bound);

private:
    uint64_t state;
};

// A launch, checked.
struct Launch {
    const Kernel* kernel;
    dim3 grid, block;
    uint32_t shared;
    const void* const* arguments;
};

class Block {
public:
    Block(const Launch& launch, dim3 index, Random& random);
    ~Block();

    // Runs all threads to their end. Empty, or what went wrong.
    std::string run();

    // What a thread of the block calls.
    void yield();
    uint32_t draw(uint32_t bound) { return random.below(bound); }
    void barrier(uint32_t id, uint32_t threads, bool all);
    uint64_t exchange(uint32_t mask, uint64_t value, uint32_t lane);
    uint32_t ballot(uint32_t mask, bool vote);
    void* shared(const void* site, size_t bytes, size_t alignment);
    unsigned char* dynamic() { return dynamic_memory; }

private:
    enum class State { Ready, Barrier, Warp, Done };
    enum class Operation { Exchange, Ballot };

    struct Thread {
        Context context;
        dim3 index;
        State state;
        // Of the barrier, or of the exchange, that the thread waits at.
        uint32_t barrier;
        Operation operation;
        uint32_t mask, lane;
        uint64_t value, result;
    };

    struct Barrier {
        uint32_t expected, arrived;
        bool all;
    };

    struct Array {
        const void* site;
        void* memory;
    };

    static void enter();
    void finish();
    void resume(uint32_t thread);
    void suspend();
    void fail(const std::string& what);
    void release_barrier(uint32_t id);
    uint64_t collective(Operation operation, uint32_t mask, uint64_t value, uint32_t lane);
    void release_warp(uint32_t warp);
    void visit(uint32_t warp);
    std::string stuck() const;

    const Launch& launch;
    dim3 index;
    Random& random;
    std::vector<Thread> threads;
    Barrier barriers[16] = {};
    std::vector<Array> arrays;
    unsigned char* dynamic_memory = nullptr;
    Context scheduler;
    uint32_t running = 0, alive = 0, ready = 0;
    // Threads that yielded since one of them did something else.
    uint64_t idle = 0;
    std::string error;
};

}  // namespace shim
