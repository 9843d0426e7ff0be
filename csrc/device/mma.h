// Products of matrices on the tensor cores of a warp, and the loads that bring operands from shared memory.
// All 32 lanes call together; fragments are spread over them as the PTX ISA says ("mma.m16n8k16",
// "ldmatrix"). With g = lane / 4 and t = lane % 4, and neighbours in a row packed into a register, the lower
// one in its lower half:
//
//   A, 16 x 16: a[0] row g, columns 2t and 2t + 1; a[1] row g + 8; a[2], a[3] the same 8 columns on
//   B, 16 x 8:  b0 column g, rows 2t and 2t + 1; b1 the same 8 rows on
//   C, 16 x 8:  c[0], c[1] row g, columns 2t and 2t + 1; c[2], c[3] row g + 8
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/half.h"
#include "device/half.h"
#include "device/memory.h"
#include "device/qualifiers.h"
#include "device/smem.h"

#if TILEWRIGHT_EMULATED
#include "emulator/runtime.h"
#endif

namespace tilewright::device {

template <class T>
concept MmaElement = std::is_same_v<T, fp16> || std::is_same_v<T, bf16>;

// Two neighbours of a row, as a fragment holds them.
template <MmaElement T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const Vector<T, 2> pair = from_float2<T>({low, high});
  uint32_t packed;
  memcpy(&packed, &pair, sizeof packed);
  return packed;
}

#if TILEWRIGHT_EMULATED

using emulator::Site;

template <MmaElement T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  Site site = Site::current()) {
  emulator::MmaOperands operands{{a[0], a[1], a[2], a[3]}, {b0, b1}, c};
  emulator::mma_m16n8k16(operands, std::is_same_v<T, bf16>, site);
}

inline void load_matrices(uint32_t (&registers)[4], SharedAddress row, Site site = Site::current()) {
  emulator::load_matrices(registers, row, /*transposed=*/false, site);
}

inline void load_matrices_transposed(uint32_t (&registers)[4], SharedAddress row,
                                     Site site = Site::current()) {
  emulator::load_matrices(registers, row, /*transposed=*/true, site);
}

#else

// c += a b, products and sums in fp32.
template <MmaElement T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four matrices of 8 x 8 elements of 16 bits. Lane 8 i + r names row r of matrix i, 16 bytes, aligned;
// register i of each lane is its part of matrix i: of row g the columns 2t and 2t + 1.
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(row)
               : "memory");
}

// As above, of the transposed matrices: of column g the rows 2t and 2t + 1.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&registers)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(row)
               : "memory");
}

#endif

}  // namespace tilewright::device
