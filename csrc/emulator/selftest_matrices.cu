// A product of matrices by the tensor cores' instructions, as attention uses them.
#include "core/check.h"
#include "device/launch.h"
#include "device/mma.h"
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

}  // namespace

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
