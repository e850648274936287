// A stack of its own for each CUDA thread, and the change from one to another.
#pragma once

#include <cstddef>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace shim {

// Where a fibre, or the thread that runs fibres, goes on.
struct Context {
#ifdef __x86_64__
    void* stack;
#else
    ucontext_t context;
#endif
};

// Goes on at `to`; whoever goes on at `from` comes back here.
void change(Context& from, const Context& to);

// Memory for one fibre's stack, with a page before it that nobody may touch.
class Stack {
public:
    Stack();
    ~Stack();
    Stack(const Stack&) = delete;
    Stack& operator=(const Stack&) = delete;

    // A fibre on this stack that has not begun; `enter` must not return.
    void begin(Context& context, void (*enter)());

private:
    char* memory;
};

}  // namespace shim
