// CUDA's built-in types and variables, as the emulator provides them. They live in the global
// namespace because that is where nvcc puts its own.
#pragma once

#include <cstdint>

struct uint3 {
  unsigned int x, y, z;
};

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1) : x(x_), y(y_), z(z_) {}
};

// A block never leaves its OS thread, so thread-local variables that the scheduler rewrites at every
// switch serve all its threads. initial-exec: one instruction to reach instead of a call.
#define TILEWRIGHT_EMULATOR_LOCAL constinit thread_local __attribute__((tls_model("initial-exec")))
extern TILEWRIGHT_EMULATOR_LOCAL uint3 threadIdx;
extern TILEWRIGHT_EMULATOR_LOCAL uint3 blockIdx;
extern TILEWRIGHT_EMULATOR_LOCAL dim3 blockDim;
extern TILEWRIGHT_EMULATOR_LOCAL dim3 gridDim;
