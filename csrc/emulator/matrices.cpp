// The matrix instructions of a warp: mma and ldmatrix. A lane's operand is a pointer to what it brings.
#include <cstring>

#include "core/check.h"
#include "core/half.h"
#include "emulator/block.h"

namespace tilewright::emulator {

namespace {

constexpr unsigned kRows = 16, kColumns = 8, kDepth = 16;

struct MatrixRow {
  const char* start;
  uint32_t* registers;
};

template <class T>
const T& operand(const uint64_t* values, unsigned lane) {
  return *reinterpret_cast<const T*>(values[lane]);
}

float widened(uint16_t bits, bool brain_floats) {
  return brain_floats ? widen(bf16{bits}) : widen(fp16{bits});
}

struct Operands {
  float a[kRows][kDepth], b[kDepth][kColumns];
};

void gather(Operands& to, const uint64_t* values, bool brain_floats) {
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    const MmaOperands& from = operand<MmaOperands>(values, lane);
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned half = 0; half < 2; ++half) {
      const unsigned shift = 16 * half, inner = 2 * t + half;
      for (unsigned i = 0; i < 4; ++i)
        to.a[g + i % 2 * 8][inner + i / 2 * 8] = widened(uint16_t(from.a[i] >> shift), brain_floats);
      for (unsigned i = 0; i < 2; ++i)
        to.b[inner + i * 8][g] = widened(uint16_t(from.b[i] >> shift), brain_floats);
    }
  }
}

}  // namespace

// The hardware's order of summation is not documented; here it is that of the depth, in fp32.
void multiply_fragments(const uint64_t* values, bool brain_floats) {
  Operands operands;
  gather(operands, values, brain_floats);
  float sums[kRows][kColumns] = {};
  for (unsigned row = 0; row < kRows; ++row) {
    for (unsigned k = 0; k < kDepth; ++k) {
      for (unsigned column = 0; column < kColumns; ++column)
        sums[row][column] += operands.a[row][k] * operands.b[k][column];
    }
  }
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    float* c = operand<MmaOperands>(values, lane).c;
    for (unsigned i = 0; i < 4; ++i) c[i] += sums[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
  }
}

namespace {

constexpr unsigned kSparseDepth = 32;

// The first operand. What is not kept meets nothing, not even an infinity.
struct KeptElement {
  float value = 0.0f;
  bool kept = false;
};

void gather_kept(KeptElement (&to)[kRows][kSparseDepth], const uint64_t* values, bool brain_floats,
                 unsigned selector) {
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    const MmaSparseOperands& from = operand<MmaSparseOperands>(values, lane);
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = g + i % 2 * 8, half = i / 2;  // of the columns; t is the group of four there
      const MmaSparseOperands& source = operand<MmaSparseOperands>(values, g * 4 + 2 * selector + half);
      const unsigned nibble = source.metadata >> (16 * (i % 2) + 4 * t) & 15u;
      const unsigned first = nibble & 3u, second = nibble >> 2;
      if (first >= second) {
        Block::running().report(source.site,
                                str("mma_sparse_m16n8k32: the metadata of row ", row, ", columns ",
                                    16 * half + 4 * t, " on, are ", nibble, ": positions must ascend"));
      }
      KeptElement* four = to[row] + 16 * half + 4 * t;
      four[first] = {widened(uint16_t(from.a[i]), brain_floats), true};
      four[second] = {widened(uint16_t(from.a[i] >> 16), brain_floats), true};
    }
  }
}

}  // namespace

void multiply_sparse_fragments(const uint64_t* values, uint32_t variant) {
  const bool brain_floats = (variant & 1u) != 0;
  KeptElement a[kRows][kSparseDepth];
  float b[kSparseDepth][kColumns];
  gather_kept(a, values, brain_floats, variant >> 1);
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    const MmaSparseOperands& from = operand<MmaSparseOperands>(values, lane);
    for (unsigned i = 0; i < 4; ++i) {
      for (unsigned half = 0; half < 2; ++half)
        b[8 * i + 2 * (lane % 4) + half][lane / 4] = widened(uint16_t(from.b[i] >> 16 * half), brain_floats);
    }
  }
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    float* c = operand<MmaSparseOperands>(values, lane).c;
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
      float sum = 0;
      for (unsigned k = 0; k < kSparseDepth; ++k) {
        if (a[row][k].kept) sum += a[row][k].value * b[k][column];
      }
      c[i] += sum;
    }
  }
}

void spread_matrices(const uint64_t* values, bool transposed) {
  uint16_t matrices[4][8][8];
  for (unsigned lane = 0; lane < kWarpLanes; ++lane)
    std::memcpy(matrices[lane / 8][lane % 8], operand<MatrixRow>(values, lane).start, 16);
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; ++i) {
      const auto& matrix = matrices[i];
      const uint32_t low = transposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint32_t high = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      operand<MatrixRow>(values, lane).registers[i] = high << 16 | low;
    }
  }
}

void Block::load_matrices(uint32_t (&registers)[4], uint32_t row, bool transposed, Site site) {
  constexpr size_t kRowBytes = 16;
  const char* start = shared_ + row;
  check_aligned(start, kRowBytes, site);
  if (row + kRowBytes > grid_->shared_bytes) report(site, "load_matrices: the row is not in shared memory");
  note_access(start, kRowBytes, false);
  const MatrixRow mine{start, registers};
  warp_collective(WarpOp::kLoadMatrices, reinterpret_cast<uint64_t>(&mine), transposed, ~0u, site);
}

// ---- Calls from within a kernel ----------------------------------------------------------------

void mma_m16n8k16(MmaOperands& operands, bool brain_floats, Site site) {
  Block::running().warp_collective(WarpOp::kMma, reinterpret_cast<uint64_t>(&operands), brain_floats, ~0u,
                                   site);
}

void mma_sparse_m16n8k32(MmaSparseOperands& operands, bool brain_floats, int selector, Site site) {
  Block::running().warp_collective(WarpOp::kMmaSparse, reinterpret_cast<uint64_t>(&operands),
                                   uint32_t(brain_floats) | uint32_t(selector) << 1, ~0u, site);
}

void load_matrices(uint32_t (&registers)[4], uint32_t row, bool transposed, Site site) {
  Block::running().load_matrices(registers, row, transposed, site);
}

}  // namespace tilewright::emulator
