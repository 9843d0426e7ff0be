// Fibres: threads of control on one OS thread, each with its own stack, switched by hand.
#pragma once

#include <cstddef>

#include "emulator/sanitizer.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace tilewright::emulator {

// A suspended fibre: on x86-64 its stack pointer, the registers being on the stack.
#if defined(__x86_64__)

using Context = void*;

extern "C" __attribute__((visibility("hidden"))) void tilewright_emulator_switch(void** saved, void* next);

inline void switch_context(Context& from, Context& to) { tilewright_emulator_switch(&from, to); }

inline void prefetch_context(Context context) {
  __builtin_prefetch(context);
  __builtin_prefetch(static_cast<const char*>(context) + 64);
}

#else

using Context = ucontext_t;

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

inline void prefetch_context(const Context&) {}

#endif

// The memory of one fibre's stack. Below it lies a page that nobody may touch, so an overflow is a
// segmentation fault there and never a change to something else.
class Stack {
 public:
  Stack();
  ~Stack();
  Stack(Stack&& other) noexcept : bottom_(other.bottom_) { other.bottom_ = nullptr; }
  Stack& operator=(Stack&&) = delete;

  // A kernel's parameters, up to 32 KiB, are passed on it by value; sanitizers widen every frame.
  static constexpr size_t kBytes = (kAddressSanitizer ? 512 : 128) * 1024;

  char* bottom() const { return bottom_; }

 private:
  char* bottom_;
};

class Fibre {
 public:
  // Makes `entry` the next thing that this fibre does, on a stack that nothing else uses. `entry` calls
  // entered() first and never returns: it ends in switch_to with `ended`.
  void prepare(const Stack& stack, size_t stack_offset, void (*entry)());

  // Suspends this fibre, which is the running one, and continues `next`.
  void switch_to(Fibre& next, bool ended = false) {
    note_switch(next, ended);
    switch_context(context_, next.context_);
    entered();
  }

  // Brings what a switch to this fibre touches into the cache.
  void prefetch() const { prefetch_context(context_); }

#if TILEWRIGHT_ASAN
  void entered();
#else
  void entered() {}
#endif

 private:
  Context context_{};
#if TILEWRIGHT_ASAN
  void note_switch(Fibre& next, bool ended);

  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
  Fibre* came_from_ = nullptr;
#else
  void note_switch(Fibre&, bool) {}
#endif
};

}  // namespace tilewright::emulator
