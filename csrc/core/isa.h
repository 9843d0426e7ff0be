// One source, several instruction sets. A NAME_cpu.cpp is compiled once per level with TW_ISA set to the
// level's name and puts everything into namespace tilewright::TW_ISA, so that no symbol compiled for a
// newer CPU can be picked by the linker for an older one.
#pragma once

#include "core/cpu_level.h"

#if defined(__x86_64__)
#define TW_FOR_EACH_ISA(F) F(baseline) F(avx2) F(avx512) F(avx512_bf16)
#else
#define TW_FOR_EACH_ISA(F) F(baseline)
#endif

// Declares `result name signature` in every level's namespace.
#define TW_DECLARE_CPU(result, name, signature) \
  namespace baseline {                          \
  result name signature;                        \
  }                                             \
  TW_DECLARE_X86_(result, name, signature)

// Calls the version of `name` for the level in use.
#define TW_CALL_CPU(name, ...) TW_CALL_CPU_(name, (__VA_ARGS__))

#if defined(__x86_64__)
#define TW_DECLARE_X86_(result, name, signature) \
  namespace avx2 {                               \
  result name signature;                         \
  }                                              \
  namespace avx512 {                             \
  result name signature;                         \
  }                                              \
  namespace avx512_bf16 {                        \
  result name signature;                         \
  }
#define TW_CALL_CPU_(name, arguments)                     \
  [&] {                                                   \
    switch (::tilewright::cpu_level()) {                  \
      case ::tilewright::CpuLevel::kAvx512Bf16:           \
        return ::tilewright::avx512_bf16::name arguments; \
      case ::tilewright::CpuLevel::kAvx512:               \
        return ::tilewright::avx512::name arguments;      \
      case ::tilewright::CpuLevel::kAvx2:                 \
        return ::tilewright::avx2::name arguments;        \
      default:                                            \
        return ::tilewright::baseline::name arguments;    \
    }                                                     \
  }()
#else
#define TW_DECLARE_X86_(result, name, signature)
#define TW_CALL_CPU_(name, arguments) ::tilewright::baseline::name arguments
#endif
