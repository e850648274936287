#include "block.h"

#include <cstdio>
#include <cstdlib>

__thread dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

static constexpr uint32_t WARP = 32;
// A block whose threads do nothing but yield, so often, waits for something that never comes.
static constexpr uint64_t MOST_IDLE = 20'000'000;

static __thread Block* current;

// Stacks are kept from one block to the next.
static thread_local std::vector<std::unique_ptr<Stack>> stacks;

uint32_t Random::below(uint32_t bound) {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return static_cast<uint32_t>((z ^ z >> 31) >> 32) % bound;
}

static void* poisoned(size_t bytes, size_t alignment) {
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment < sizeof(void*) ? sizeof(void*) : alignment, bytes) != 0) {
        perror("shared memory");
        abort();
    }
    memset(memory, 0xff, bytes);
    return memory;
}

Block::Block(const Launch& launch, dim3 index, Random& random)
    : launch(launch), index(index), random(random), threads(launch.block.x * launch.block.y * launch.block.z) {
    while (stacks.size() < threads.size()) stacks.push_back(std::make_unique<Stack>());
    for (size_t at = 0; at < threads.size(); at++) {
        uint32_t x = at % launch.block.x, rest = at / launch.block.x;
        threads[at].index = {x, rest % launch.block.y, rest / launch.block.y};
        threads[at].state = State::Ready;
        stacks[at]->begin(threads[at].context, enter);
    }
    alive = ready = threads.size();
    if (launch.shared > 0) dynamic_memory = static_cast<unsigned char*>(poisoned(launch.shared, 1024));
}

Block::~Block() {
    for (auto& array : arrays) free(array.memory);
    free(dynamic_memory);
}

std::string Block::run() {
    current = this;
    blockIdx = index;
    blockDim = launch.block;
    gridDim = launch.grid;
    uint32_t warps = ceil(threads.size() / double{WARP});
    while (alive > 0 && error.empty()) {
        if (ready == 0 || idle > MOST_IDLE) fail(stuck());
        else visit(random.below(warps));
    }
    current = nullptr;
    return error;
}

// Runs lanes of a warp, each to where it waits, in a random order. Some are passed over: lanes do not run in step.
void Block::visit(uint32_t warp) {
    uint32_t first = random.below(WARP), stride = random.below(WARP / 2) * 2 + 1;
    uint32_t skipped = random.below(2) ? 0 : random.below(WARP);
    for (uint32_t step = skipped; step < WARP && error.empty(); step++) {
        uint32_t thread = warp * WARP + (first + step * stride) % WARP;
        if (thread < threads.size() && threads[thread].state == State::Ready) resume(thread);
    }
}

void Block::resume(uint32_t thread) {
    running = thread;
    threadIdx = threads[thread].index;
    change(scheduler, threads[thread].context);
}

void Block::suspend() { change(threads[running].context, scheduler); }

void Block::enter() {
    Block& block = *current;
    block.launch.kernel->call(block.launch.arguments);
    block.finish();
}

void Block::finish() {
    idle = 0;
    alive--;
    ready--;
    threads[running].state = State::Done;
    for (uint32_t id = 0; id < 16; id++) {
        if (barriers[id].all && barriers[id].arrived > 0) release_barrier(id);
    }
    release_warp(running / WARP);
    suspend();
}

// Ends the block. The thread that calls this does not go on.
void Block::fail(const std::string& what) {
    char where[96];
    snprintf(where, sizeof where, "block (%u, %u, %u): ", index.x, index.y, index.z);
    error = where + what;
}

std::string Block::stuck() const {
    if (idle > MOST_IDLE) return "threads wait in loops for what never comes";
    std::string text = "threads wait for each other:";
    for (uint32_t id = 0; id < 16; id++) {
        if (barriers[id].arrived == 0) continue;
        uint32_t expected = barriers[id].all ? alive : barriers[id].expected;
        text += " " + std::to_string(barriers[id].arrived) + " of " + std::to_string(expected) + " at barrier " +
                std::to_string(id) + ",";
    }
    uint32_t lanes = 0;
    for (auto& thread : threads) lanes += thread.state == State::Warp;
    return text + " " + std::to_string(lanes) + " in exchanges of a warp";
}

void Block::yield() {
    idle++;
    suspend();
}

void Block::barrier(uint32_t id, uint32_t expected, bool all) {
    Barrier& barrier = barriers[id];
    if (id >= 16 || (barrier.arrived > 0 && (barrier.all != all || barrier.expected != expected))) {
        fail("barrier " + std::to_string(id) + ": threads expect different numbers of threads");
        suspend();
    }
    idle = 0;
    barrier = {expected, barrier.arrived + 1, all};
    threads[running].state = State::Barrier;
    threads[running].barrier = id;
    ready--;
    release_barrier(id);
    suspend();
}

void Block::release_barrier(uint32_t id) {
    Barrier& barrier = barriers[id];
    if (barrier.arrived < (barrier.all ? alive : barrier.expected)) return;
    barrier.arrived = 0;
    for (auto& thread : threads) {
        if (thread.state != State::Barrier || thread.barrier != id) continue;
        thread.state = State::Ready;
        ready++;
    }
}

uint64_t Block::exchange(uint32_t mask, uint64_t value, uint32_t lane) {
    return collective(Operation::Exchange, mask, value, lane);
}

uint32_t Block::ballot(uint32_t mask, bool vote) { return collective(Operation::Ballot, mask, vote, 0); }

uint64_t Block::collective(Operation operation, uint32_t mask, uint64_t value, uint32_t lane) {
    Thread& thread = threads[running];
    if (!(mask >> running % WARP & 1)) {
        fail("an exchange of a warp: its mask lacks the calling lane");
        suspend();
    }
    idle = 0;
    thread.state = State::Warp;
    thread.operation = operation;
    thread.mask = mask;
    thread.lane = lane;
    thread.value = value;
    ready--;
    release_warp(running / WARP);
    suspend();
    return thread.result;
}

// Lets those lanes of a warp go on whose partners have all come. Lanes that have ended are not waited for.
void Block::release_warp(uint32_t warp) {
    Thread* lanes = &threads[warp * WARP];
    uint32_t count = min<uint32_t>(WARP, threads.size() - warp * WARP), seen = 0;
    for (uint32_t lane = 0; lane < count; lane++) {
        if (seen >> lane & 1 || lanes[lane].state != State::Warp) continue;
        uint32_t mask = lanes[lane].mask, come = 0, votes = 0;
        bool complete = true;
        for (uint32_t other = 0; other < count; other++) {
            const Thread& partner = lanes[other];
            if (!(mask >> other & 1) || partner.state == State::Done) continue;
            bool same = partner.state == State::Warp && partner.mask == mask && partner.operation == lanes[lane].operation;
            complete = complete && same;
            if (same) come |= 1u << other, votes |= static_cast<uint32_t>(partner.value & 1) << other;
        }
        seen |= come;
        if (!complete) continue;
        for (uint32_t other = 0; other < count; other++) {
            if (!(come >> other & 1)) continue;
            Thread& partner = lanes[other];
            bool exchange = partner.operation == Operation::Exchange;
            if (exchange && (partner.lane >= WARP || !(come >> partner.lane & 1))) {
                // The hardware gives something undefined.
                partner.result = ~uint64_t{0};
            } else {
                partner.result = exchange ? lanes[partner.lane].value : votes;
            }
            partner.state = State::Ready;
            ready++;
        }
    }
}

void* Block::shared(const void* site, size_t bytes, size_t alignment) {
    for (auto& array : arrays) {
        if (array.site == site) return array.memory;
    }
    void* memory = poisoned(bytes, alignment);
    arrays.push_back({site, memory});
    return memory;
}

void yield() { current->yield(); }
uint32_t random(uint32_t bound) { return current->draw(bound); }
void barrier(uint32_t id, uint32_t threads) { current->barrier(id, threads, false); }
uint64_t exchange(uint32_t mask, uint64_t value, uint32_t lane) { return current->exchange(mask, value, lane); }
uint32_t ballot(uint32_t mask, bool vote) { return current->ballot(mask, vote); }
void* shared(const void* site, size_t bytes, size_t alignment) { return current->shared(site, bytes, alignment); }

}  // namespace shim

void __syncthreads() { shim::current->barrier(0, 0, true); }
unsigned char* dynamic_shared() { return shim::current->dynamic(); }
