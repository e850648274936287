#include "fibre.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

namespace shim {

static constexpr size_t GUARD = 64 << 10, SIZE = 256 << 10;

Stack::Stack() {
    void* found = mmap(nullptr, GUARD + SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED || mprotect(found, GUARD, PROT_NONE) != 0) {
        perror("stack of a fibre");
        abort();
    }
    memory = static_cast<char*>(found);
}

Stack::~Stack() { munmap(memory, GUARD + SIZE); }

#ifdef __x86_64__

// Registers that a function must keep are pushed, the stacks exchanged, and the other's registers popped.
asm(R"(
    .text
    .type conclave_shim_change, @function
conclave_shim_change:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size conclave_shim_change, .-conclave_shim_change
)");
extern "C" void conclave_shim_change(void** from, void* to);

void change(Context& from, const Context& to) { conclave_shim_change(&from.stack, to.stack); }

void Stack::begin(Context& context, void (*enter)()) {
    // Six registers, the address to return to (on a multiple of 16, as after a call), and a word to spare.
    void** top = reinterpret_cast<void**>(memory + GUARD + SIZE) - 8;
    for (int at = 0; at < 8; at++) top[at] = nullptr;
    top[6] = reinterpret_cast<void*>(enter);
    context.stack = top;
}

#else

void change(Context& from, const Context& to) { swapcontext(&from.context, &to.context); }

void Stack::begin(Context& context, void (*enter)()) {
    getcontext(&context.context);
    context.context.uc_stack.ss_sp = memory + GUARD;
    context.context.uc_stack.ss_size = SIZE;
    context.context.uc_link = nullptr;
    makecontext(&context.context, enter, 0);
}

#endif

}  // namespace shim
