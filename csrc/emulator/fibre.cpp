#include "emulator/fibre.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

namespace tilewright::emulator {

// ---- Stacks ------------------------------------------------------------------------------------

namespace {
constexpr size_t kForbiddenBytes = 64 * 1024;  // a page, whatever the page size of the machine
}

Stack::Stack() {
  void* memory = mmap(nullptr, kForbiddenBytes + kBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  bottom_ = static_cast<char*>(memory) + kForbiddenBytes;
  if (mprotect(memory, kForbiddenBytes, PROT_NONE) != 0) {
    munmap(memory, kForbiddenBytes + kBytes);
    throw std::bad_alloc();
  }
}

Stack::~Stack() {
  if (bottom_ == nullptr) return;
  allow_access(bottom_, kBytes);
  munmap(bottom_ - kForbiddenBytes, kForbiddenBytes + kBytes);
}

// ---- The switch --------------------------------------------------------------------------------

#if defined(__x86_64__)

// What the ABI lets a called function change need not be kept. The floating-point control words belong
// to the OS thread: no kernel changes them.
asm(R"(
    .pushsection .text
    .p2align 4
    .globl tilewright_emulator_switch
    .hidden tilewright_emulator_switch
    .type tilewright_emulator_switch, @function
tilewright_emulator_switch:
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
    .size tilewright_emulator_switch, . - tilewright_emulator_switch
    .popsection
)");

namespace {

// The stack of a fibre that has yet to start, as the switch expects to find it. The last slot stands
// for the return address of `entry`, and puts the stack where the ABI wants it on entry.
struct FirstFrame {
  uint64_t saved_registers[6];
  void (*entry)();
  uint64_t no_return_address;
};

void prepare_context(Context& stack_pointer, char* bottom, size_t bytes, void (*entry)()) {
  const FirstFrame frame{{}, entry, 0};
  stack_pointer = bottom + bytes - sizeof frame;
  std::memcpy(stack_pointer, &frame, sizeof frame);
}

}  // namespace

#else

namespace {

void prepare_context(Context& context, char* bottom, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = bottom;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

}  // namespace

#endif

// ---- Fibres ------------------------------------------------------------------------------------

void Fibre::prepare(const Stack& stack, size_t stack_offset, void (*entry)()) {
  // Fibres abandoned by an earlier failure left the marks of their frames.
  allow_access(stack.bottom(), Stack::kBytes);
  prepare_context(context_, stack.bottom(), Stack::kBytes - stack_offset, entry);
#if TILEWRIGHT_ASAN
  fake_stack_ = nullptr;
  bottom_ = stack.bottom();
  bytes_ = Stack::kBytes;
#endif
}

#if TILEWRIGHT_ASAN

void Fibre::note_switch(Fibre& next, bool ended) {
  next.came_from_ = this;
  __sanitizer_start_switch_fiber(ended ? nullptr : &fake_stack_, next.bottom_, next.bytes_);
}

// The stack of the OS thread itself is learnt here, when the first fibre has been switched to from it.
void Fibre::entered() {
  __sanitizer_finish_switch_fiber(fake_stack_, &came_from_->bottom_, &came_from_->bytes_);
}

#endif

}  // namespace tilewright::emulator
