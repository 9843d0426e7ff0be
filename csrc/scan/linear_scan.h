// The linear recurrence, along one axis of tensors of any shape, real or complex:
//
//   h[t] = a[t] h[t-1] + b[t],   h[-1] = h0
//
// and its gradient. With g the gradient of h and mu[t] what flows from step t to the step before it,
//
//   lam[t] = g[t] + mu[t+1],   mu[t] = conj(a[t]) lam[t],   mu[L] = 0
//   db[t] = lam[t],   da[t] = lam[t] conj(h[t-1]),   dh0 = mu[0]
//
// so the gradient is a scan in the other direction that reads a, g, h and writes da, db, all in one sweep.
// Reversed, t runs from the end and h0 enters there. Packed sequences lie one behind the other along the
// axis.
//
// A tensor is seen as (outer axes, step, inner): inner is the axis whose neighbours are neighbours in memory
// too, if that is not the step axis itself.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace tilewright::scan {

constexpr int kMaxOuterAxes = 6;
constexpr int64_t kMinAcross = 16;  // inner elements from which on the lanes of a vector lie across inner

struct ScanTensor {
  void* data;  // null: absent
  // Strides in elements. States (h0, dh0) have no steps; their sequence stride is for packed sequences.
  int64_t step, inner, sequence;
  int64_t outer[kMaxOuterAxes];
};

// x, y: b and h forward, the gradient of h and db backward. Outputs are dense and have one layout.
struct LinearScanParams {
  ScanTensor a, x, y;      // of dtype
  ScanTensor h, da;        // backward, of dtype; both null: da is not wanted
  ScanTensor h0;           // of the accumulator's dtype (float32 where dtype is a 16-bit one); null: zeros
  ScanTensor dh0;          // backward, of the accumulator's dtype; null: not wanted
  const int64_t* seqlens;  // [sequences + 1], where packed sequences start and end; null: one, of all steps
  void* workspace;         // linear_scan_workspace_cuda() bytes, 16-byte aligned; unused on the CPU
  int64_t sizes[kMaxOuterAxes];
  int64_t outer;  // product of sizes
  int64_t length, inner, sequences;
  int32_t outer_axes;
  DType dtype;
  bool backward;
  bool descending;  // the direction in which this sweep visits the steps
};

// Lanes across the inner axis rather than along the steps.
constexpr bool lanes_across(const LinearScanParams& p) { return p.y.inner == 1 && p.inner >= kMinAcross; }

int64_t linear_scan_workspace_cuda(const LinearScanParams&);  // bytes
void linear_scan_cuda(const LinearScanParams&, int device, Stream);

}  // namespace tilewright::scan

namespace tilewright {
TW_DECLARE_CPU(void, linear_scan_cpu, (const scan::LinearScanParams&, int threads))
}  // namespace tilewright
