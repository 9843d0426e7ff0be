// A product of matrices by the tensor cores' instructions, as attention uses them.
#include "core/check.h"
#include "device/launch.h"
#include "device/mma.h"
#include "device/mma_sparse.h"
#include "device/warp.h"
#include "emulator/selftest.h"

namespace tilewright::selftest {

using namespace tilewright::device;

namespace {

constexpr int kRows = 16, kColumns = 8, kDepth = 16;

struct ProductParams {
  const uint16_t* a;  // [kRows, kDepth]
  const uint16_t* b;  // [kDepth, kColumns], or the transpose
  float* c;           // [kRows, kColumns], added to
  bool a_transposed, b_transposed;
};

struct ProductShared {
  alignas(16) uint16_t a[kRows * kDepth], b[kDepth * kColumns];
};

// Lane 8 i + r names row r of a fragment's matrix i, whose place is (first, second) in units of 8.
struct MatrixPlace {
  int first, second;
};

__device__ __forceinline__ MatrixPlace place_of(int matrix) { return {matrix % 2, matrix / 2}; }

template <class T>
__global__ void product_kernel(const __grid_constant__ ProductParams p) {
  ProductShared& shared = shared_memory<ProductShared>();
  const int lane = lane_id();
  for (int i = lane; i < kRows * kDepth; i += kWarpSize) shared.a[i] = p.a[i];
  for (int i = lane; i < kDepth * kColumns; i += kWarpSize) shared.b[i] = p.b[i];
  sync_warp();
  const MatrixPlace place = place_of(lane / 8);
  uint32_t a[4], b[4];
  if (p.a_transposed) {
    const uint16_t* row = shared.a + (place.second * 8 + lane % 8) * kRows + place.first * 8;
    load_matrices_transposed(a, shared_address(row));
  } else {
    const uint16_t* row = shared.a + (place.first * 8 + lane % 8) * kDepth + place.second * 8;
    load_matrices(a, shared_address(row));
  }
  // Only two matrices are B's: the other lanes name them again.
  if (p.b_transposed) {
    load_matrices(b, shared_address(shared.b + lane % 8 * kDepth + place.first * 8));
  } else {
    load_matrices_transposed(b, shared_address(shared.b + (place.first * 8 + lane % 8) * kColumns));
  }
  const int row = lane / 4, column = lane % 4 * 2;
  float c[4];
  for (int i = 0; i < 4; ++i) c[i] = p.c[(row + i / 2 * 8) * kColumns + column + i % 2];
  mma_m16n8k16<T>(c, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) p.c[(row + i / 2 * 8) * kColumns + column + i % 2] = c[i];
}

struct SparseParams {
  const uint16_t* a;      // [kRows, kDepth], the kept elements
  const uint8_t* places;  // [kRows, kSparseDepth / 8], four bits for each four columns
  const uint16_t* b;      // [kSparseDepth, kColumns]
  float* c;
};

constexpr int kSparseDepth = 32;

// The lanes that a selector does not name bring metadata that would be refused.
template <class T, int kSelector>
__global__ void sparse_kernel(const __grid_constant__ SparseParams p) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  uint32_t a[4], b[4], metadata = 0;
  for (int i = 0; i < 4; ++i) {
    const uint16_t* pair = p.a + (g + i % 2 * 8) * kDepth + 2 * t + i / 2 * 8;
    a[i] = uint32_t{pair[1]} << 16 | pair[0];
    const uint16_t* column = p.b + (8 * i + 2 * t) * kColumns + g;
    b[i] = uint32_t{column[kColumns]} << 16 | column[0];
  }
  if (t / 2 == kSelector) {
    for (int half = 0; half < 2; ++half) {
      const uint8_t* bytes = p.places + (g + half * 8) * (kSparseDepth / 8) + t % 2 * 2;
      metadata |= (uint32_t{bytes[0]} | uint32_t{bytes[1]} << 8) << 16 * half;
    }
  }
  float c[4];
  for (int i = 0; i < 4; ++i) c[i] = p.c[(g + i / 2 * 8) * kColumns + 2 * t + i % 2];
  mma_sparse_m16n8k32<T, kSelector>(c, a, b, metadata);
  for (int i = 0; i < 4; ++i) p.c[(g + i / 2 * 8) * kColumns + 2 * t + i % 2] = c[i];
}

}  // namespace

Floats sparse_matrix_product(const std::string& type, const Halves& a, const Bytes& places, const Halves& b,
                             const Floats& c, int selector) {
  check_value(a.size() == kRows * kDepth && places.size() == kRows * kSparseDepth / 8 &&
                  b.size() == kSparseDepth * kColumns && c.size() == kRows * kColumns,
              "a, places, b, c: matrices of 16 x 16, 16 x 4, 32 x 8, 16 x 8");
  check_value(type == "fp16" || type == "bf16", "type: got ", type);
  Floats out = c;
  const Kernel<SparseParams> first = type == "fp16" ? sparse_kernel<fp16, 0> : sparse_kernel<bf16, 0>;
  const Kernel<SparseParams> second = type == "fp16" ? sparse_kernel<fp16, 1> : sparse_kernel<bf16, 1>;
  launch(selector == 0 ? first : second, 1, kWarpSize, 0, nullptr,
         {a.data(), places.data(), b.data(), out.data()});
  return out;
}

Floats matrix_product(const std::string& type, const Halves& a, const Halves& b, const Floats& c,
                      bool a_transposed, bool b_transposed) {
  check_value(a.size() == kRows * kDepth && b.size() == kDepth * kColumns && c.size() == kRows * kColumns,
              "a, b, c: matrices of 16 x 16, 16 x 8, 16 x 8");
  check_value(type == "fp16" || type == "bf16", "type: got ", type);
  Floats out = c;
  launch(type == "fp16" ? product_kernel<fp16> : product_kernel<bf16>, 1, kWarpSize, sizeof(ProductShared),
         nullptr, {a.data(), b.data(), out.data(), a_transposed, b_transposed});
  return out;
}

}  // namespace tilewright::selftest
