// Matrix products of a warpgroup (PTX ISA, "wgmma"; Hopper, sm_90a): four warps, of which the first has a
// number divisible by four, compute together D += A B, where D is 64 x N fp32 in registers, A is 64 x 16 in
// registers or shared memory, B is 16 x N in shared memory. Products run beside the threads:
//
//   wgmma_fence(registers...)    the registers named are written, products may use them
//   wgmma(...), wgmma(...)       begin; the threads touch neither D nor A until they have waited
//   wgmma_commit()               closes a group of products
//   wgmma_wait<N>(d)             returns when all but the N youngest groups are done, one of which had this D
//
// Tiles in shared memory are what tma_load leaves: rows of 64 elements (128 bytes), swizzled, from addresses
// that are multiples of 1024.
//
// Of D, a lane of warp w holds at [4 j + 2 i + c] row 16 w + 8 i + lane / 4, column 8 j + 2 (lane % 4) + c.
// Of A in registers it holds at [i + 2 j] the pair in row 16 w + 8 i + lane / 4, columns 8 j + 2 (lane % 4)
// and the next: D narrowed is A of a product over D's columns.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/half.h"
#include "device/qualifiers.h"
#include "device/smem.h"

#if TILEWRIGHT_EMULATED
#include "emulator/hopper.h"
#endif

namespace tilewright::device {

inline constexpr int kWarpgroup = 128;
inline constexpr int kWgmmaRows = 64;
inline constexpr int kWgmmaDepth = 16;

// Whether this pass of the compiler can emit these instructions: the body of a kernel that uses them is
// guarded by it, since a kernel is compiled for all architectures of the build.
#if TILEWRIGHT_EMULATED || defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHasWgmma = true;
#else
inline constexpr bool kHasWgmma = false;
#endif

template <class T>
concept WgmmaElement = std::is_same_v<T, fp16> || std::is_same_v<T, bf16>;

template <int N>
concept WgmmaColumns = N == 64 || N == 128;

// How an operand lies in shared memory. Along: its rows of 64 run along the depth of the product (A's rows,
// B's columns are rows of the tile). Across: a row of the tile is one depth.
enum class Major { kAlong, kAcross };

// A descriptor of 128-byte swizzle. Along: groups of 8 rows lie 1024 bytes apart. Across: likewise groups of
// 8 depths, and `panel_bytes` from one 64 columns to the next.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* tile, int panel_bytes = 16) {
  constexpr uint64_t kGroupBytes = 1024, kSwizzle128 = 1;
  return (shared_address(tile) & 0x3ffffu) >> 4 | uint64_t(panel_bytes >> 4) << 16 |
         (kGroupBytes >> 4) << 32 | kSwizzle128 << 62;
}

// The descriptor of what lies so many bytes behind: 2 bytes a depth along, 128 across, up to a panel.
__device__ __forceinline__ uint64_t wgmma_advance(uint64_t descriptor, int bytes) {
  // Only the lower half changes, and the compiler need not carry.
  return descriptor >> 32 << 32 | uint32_t(uint32_t(descriptor) + uint32_t(bytes >> 4));
}

#if TILEWRIGHT_EMULATED

using emulator::Site;

template <class... Registers>
void wgmma_fence(Registers&...) {
  emulator::matrix_fence();
}

inline void wgmma_commit() { emulator::matrix_commit(); }

template <int kPending, class D>
void wgmma_wait(D&, Site site = Site::current()) {
  emulator::matrix_wait(kPending, site);
}

template <WgmmaElement T, Major kMajorB, int N>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, Site site = Site::current()) {
  emulator::matrix_issue({N, std::is_same_v<T, bf16>, false, kMajorB == Major::kAcross, accumulate, a, b}, d,
                         nullptr, site);
}

template <WgmmaElement T, Major kMajorB, int N>
void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
           Site site = Site::current()) {
  emulator::matrix_issue({N, std::is_same_v<T, bf16>, true, kMajorB == Major::kAcross, accumulate, 0, b}, d,
                         a, site);
}

template <int kRegisters>
void take_registers(Site site = Site::current()) {
  emulator::check_register_count(kRegisters, site);
}

template <int kRegisters>
void give_registers(Site site = Site::current()) {
  emulator::check_register_count(kRegisters, site);
}

#else

// Holds the compiler to the order of what it does with the registers: it moves instructions past asm that
// does not name what they compute, as past wgmma_wait, and then nothing runs beside the products.
__device__ __forceinline__ void pin(float& value) { asm volatile("" : "+f"(value)::"memory"); }
__device__ __forceinline__ void pin(uint32_t& value) { asm volatile("" : "+r"(value)::"memory"); }

template <class T, int N>
__device__ __forceinline__ void pin(T (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) pin(values[i]);
}

template <class... Registers>
__device__ __forceinline__ void wgmma_fence(Registers&... registers) {
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending, class D>
__device__ __forceinline__ void wgmma_wait(D& d) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  pin(d);
}

// The operands of asm are counted out: D takes %0 to %(N/2 - 1), the others follow.
#define TILEWRIGHT_D32                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TILEWRIGHT_ACCUMULATORS32                                                                           \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),           \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
      "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]),            \
      "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),            \
      "+f"(d[30]), "+f"(d[31])
#define TILEWRIGHT_D64                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TILEWRIGHT_ACCUMULATORS64                                                                           \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),           \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
      "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]),            \
      "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),            \
      "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]),            \
      "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),            \
      "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]),            \
      "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]),            \
      "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define TILEWRIGHT_WGMMA_SHARED(COLUMNS, TYPE, D, A, B, ACCUMULATE, ACROSS, OPERANDS)                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE                                            \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" D "}, " A \
               ", " B ", p, 1, 1, 0, " ACROSS ";\n}"                                                     \
               : OPERANDS                                                                                \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(kAcross)                                      \
               : "memory")
#define TILEWRIGHT_WGMMA_REGISTERS(COLUMNS, TYPE, D, A, B, ACCUMULATE, ACROSS, OPERANDS)                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE                                             \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" D "}, {" A \
               "}, " B ", p, 1, 1, " ACROSS ";\n}"                                                        \
               : OPERANDS                                                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(kAcross)   \
               : "memory")

template <WgmmaElement T, Major kMajorB, int N>
  requires WgmmaColumns<N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  constexpr int kAcross = kMajorB == Major::kAcross;
  if constexpr (N == 64 && std::is_same_v<T, bf16>) {
    TILEWRIGHT_WGMMA_SHARED("64", "bf16", TILEWRIGHT_D32, "%32", "%33", "%34", "%35",
                            TILEWRIGHT_ACCUMULATORS32);
  } else if constexpr (N == 64 && std::is_same_v<T, fp16>) {
    TILEWRIGHT_WGMMA_SHARED("64", "f16", TILEWRIGHT_D32, "%32", "%33", "%34", "%35",
                            TILEWRIGHT_ACCUMULATORS32);
  } else if constexpr (N == 128 && std::is_same_v<T, bf16>) {
    TILEWRIGHT_WGMMA_SHARED("128", "bf16", TILEWRIGHT_D64, "%64", "%65", "%66", "%67",
                            TILEWRIGHT_ACCUMULATORS64);
  } else if constexpr (N == 128 && std::is_same_v<T, fp16>) {
    TILEWRIGHT_WGMMA_SHARED("128", "f16", TILEWRIGHT_D64, "%64", "%65", "%66", "%67",
                            TILEWRIGHT_ACCUMULATORS64);
  }
}

template <WgmmaElement T, Major kMajorB, int N>
  requires WgmmaColumns<N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                                      bool accumulate) {
  constexpr int kAcross = kMajorB == Major::kAcross;
  if constexpr (N == 64 && std::is_same_v<T, bf16>) {
    TILEWRIGHT_WGMMA_REGISTERS("64", "bf16", TILEWRIGHT_D32, "%32, %33, %34, %35", "%36", "%37", "%38",
                               TILEWRIGHT_ACCUMULATORS32);
  } else if constexpr (N == 64 && std::is_same_v<T, fp16>) {
    TILEWRIGHT_WGMMA_REGISTERS("64", "f16", TILEWRIGHT_D32, "%32, %33, %34, %35", "%36", "%37", "%38",
                               TILEWRIGHT_ACCUMULATORS32);
  } else if constexpr (N == 128 && std::is_same_v<T, bf16>) {
    TILEWRIGHT_WGMMA_REGISTERS("128", "bf16", TILEWRIGHT_D64, "%64, %65, %66, %67", "%68", "%69", "%70",
                               TILEWRIGHT_ACCUMULATORS64);
  } else if constexpr (N == 128 && std::is_same_v<T, fp16>) {
    TILEWRIGHT_WGMMA_REGISTERS("128", "f16", TILEWRIGHT_D64, "%64, %65, %66, %67", "%68", "%69", "%70",
                               TILEWRIGHT_ACCUMULATORS64);
  }
}

#undef TILEWRIGHT_WGMMA_SHARED
#undef TILEWRIGHT_WGMMA_REGISTERS
#undef TILEWRIGHT_D32
#undef TILEWRIGHT_D64
#undef TILEWRIGHT_ACCUMULATORS32
#undef TILEWRIGHT_ACCUMULATORS64

// A warpgroup's share of the registers, a thread. All its threads call it; the kernel is compiled for a block
// of known size, and each warpgroup has one way through it.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif

}  // namespace tilewright::device
