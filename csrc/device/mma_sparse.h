// Products on the tensor cores of a warp whose first operand keeps two of every four neighbours in a row (PTX
// ISA, "mma.sp"). Fragments are those of device/mma.h, with g = lane / 4 and t = lane % 4:
//
//   A, 16 x 32, kept elements only: as a dense 16 x 16
//   B, 32 x 8: b[i] column g, rows 8i + 2t and 8i + 2t + 1
//   C, 16 x 8
//
// The metadata say which they are by four bits for each four neighbours, the lower position in the lower two,
// ascending. Those of a warp's first operand come from two lanes of each quad, t = 2 kSelector + h: of
// columns 16h to 16h + 15, row g in the lower half of the register, row g + 8 in the upper.
#pragma once

#include "device/mma.h"

namespace tilewright::device {

#if TILEWRIGHT_EMULATED

template <MmaElement T, int kSelector>
void mma_sparse_m16n8k32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata,
                         Site site = Site::current()) {
  static_assert(kSelector == 0 || kSelector == 1);
  emulator::MmaSparseOperands operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, metadata, c, site};
  emulator::mma_sparse_m16n8k32(operands, std::is_same_v<T, bf16>, kSelector, site);
}

#else

// Before PTX 8.5 metadata were not said to be ordered.
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1205
#define TW_MMA_SPARSE "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."
#else
#define TW_MMA_SPARSE "mma.sp.sync.aligned.m16n8k32.row.col.f32."
#endif
#define TW_MMA_SPARSE_OPERANDS \
  "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"

// c += a b, products and sums in fp32.
template <MmaElement T, int kSelector>
__device__ __forceinline__ void mma_sparse_m16n8k32(float (&c)[4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[4], uint32_t metadata) {
  static_assert(kSelector == 0 || kSelector == 1);
  if constexpr (std::is_same_v<T, bf16>) {
    asm(TW_MMA_SPARSE "bf16.bf16.f32 " TW_MMA_SPARSE_OPERANDS
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(metadata), "n"(kSelector));
  } else {
    asm(TW_MMA_SPARSE "f16.f16.f32 " TW_MMA_SPARSE_OPERANDS
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(metadata), "n"(kSelector));
  }
}

#undef TW_MMA_SPARSE
#undef TW_MMA_SPARSE_OPERANDS

#endif

}  // namespace tilewright::device
