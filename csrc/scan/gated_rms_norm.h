// The RMS norm of a Mamba-2 block, gated by z before or after it. For every row and every group of `group`
// channels, with s(z) = z sigmoid(z), or 1 without z, and r = 1 / sqrt(mean(v^2) + eps):
//
//   v = x s(z)    out = v r weight            the gate before the norm
//   v = x         out = v r weight s(z)       the gate after it
//
// and the gradient, which keeps r alone and computes the rest again. With n = v r, and g = dout, times s(z)
// where the gate comes after the norm:
//
//   dv = r (g weight - n mean(g weight n))    dweight = sum over rows of g n
//   dx = dv s(z),  dz = dv x s'(z)            the gate before the norm
//   dx = dv,       dz = dout weight n s'(z)   the gate after it
#pragma once

#include <cstdint>

#include "core/integers.h"
#include "core/isa.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace tilewright::scan {

constexpr int64_t kNormPartRows = 16;     // rows whose dweight a CPU sums up in one go
constexpr int64_t kNormPartBlocks = 512;  // blocks that the backward pass on a GPU is cut into, if it can be

enum class NormGate : int32_t { kNone, kBefore, kAfter };

// Rows of dim channels that lie side by side.
struct NormRows {
  void* data;      // null: absent
  int64_t stride;  // elements from one row to the next
};

struct GatedRmsNormParams {
  NormRows x, z, out;  // of dtype; z absent with NormGate::kNone
  const void* weight;  // (dim) of weight_dtype, contiguous
  void* rstd;  // r: [row][dim / group], float32, or float64 with that dtype; read by the backward pass

  // Backward only.
  NormRows dout, dx, dz;  // of dtype
  void* dweight;          // (dim) of weight_dtype, contiguous
  void* workspace;        // gated_rms_norm_workspace() bytes; float32 [part][dim]: dweight of some rows

  int64_t rows, dim, group;  // rows > 0; group divides dim
  double eps;                // forward only
  DType dtype;               // float32, float16, bfloat16; float64 on the CPU
  DType weight_dtype;        // dtype, or float32
  NormGate gate;
};

constexpr int64_t norm_parts_cpu(const GatedRmsNormParams& p) { return divide_up(p.rows, kNormPartRows); }

// So few that the blocks, a part and group each, are not many more than a GPU needs.
constexpr int64_t norm_part_rows_cuda(const GatedRmsNormParams& p) {
  return divide_up(p.rows, larger(1, smaller(p.rows, kNormPartBlocks * p.group / p.dim)));
}
constexpr int64_t norm_parts_cuda(const GatedRmsNormParams& p) {
  return divide_up(p.rows, norm_part_rows_cuda(p));
}

// Bytes, for a backward pass.
constexpr int64_t gated_rms_norm_workspace(const GatedRmsNormParams& p, bool on_gpu) {
  if (p.rows == 0 || p.dtype == DType::kFloat64) return 0;
  return (on_gpu ? norm_parts_cuda(p) : norm_parts_cpu(p)) * p.dim * int64_t{sizeof(float)};
}

void gated_rms_norm_fwd_cuda(const GatedRmsNormParams&, int device, Stream);
void gated_rms_norm_bwd_cuda(const GatedRmsNormParams&, int device, Stream);

}  // namespace tilewright::scan

namespace tilewright {
TW_DECLARE_CPU(void, gated_rms_norm_fwd_cpu, (const scan::GatedRmsNormParams&, int threads))
TW_DECLARE_CPU(void, gated_rms_norm_bwd_cpu, (const scan::GatedRmsNormParams&, int threads))
}  // namespace tilewright
