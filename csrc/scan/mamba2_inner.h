// A Mamba-2 block from one projection to the other, or with both of them, as one call:
//
//   z, (x, B, C), dt = W_in u               x, B, C = silu(conv(x, B, C))
//   y = ssd_chunk_scan(x, dt, A, B, C)      out = W_out norm(y, z), or the scan's own gate instead
//
// and its gradient. The kernels are those of the ops of these names, and so is what each of them computes;
// all read and write where things lie in zxbcdt and its gradient. One call because large products leave
// nothing but their operands in the caches: whatever runs between two kernels comes from memory first.
#pragma once

#include "scan/causal_conv1d.h"
#include "scan/gated_rms_norm.h"
#include "scan/matmul.h"
#include "scan/ssd_chunk_scan.h"

namespace tilewright::scan {

struct Mamba2InnerParams {
  // Products are the CPU's float32 ones alone. One whose c is null is left out.
  MatmulParams in, out;
  MatmulParams dinner, dout_weight, dinput, din_weight;  // backward only
  CausalConv1dParams conv;
  SsdChunkScanParams scan;
  GatedRmsNormParams norm;                        // weight null: no norm
  bool differentiates_scan, differentiates_conv;  // backward only; the second needs the first
};

// Bytes of scratch for the kernels, which use it one after the other.
int64_t mamba2_inner_workspace_cpu(const Mamba2InnerParams&, bool backward, int threads);
int64_t mamba2_inner_workspace_cuda(const Mamba2InnerParams&, bool backward, int device);
void mamba2_inner_fwd_cpu(const Mamba2InnerParams&, int threads);
void mamba2_inner_bwd_cpu(const Mamba2InnerParams&, int threads);
void mamba2_inner_fwd_cuda(const Mamba2InnerParams&, int device, Stream);
void mamba2_inner_bwd_cuda(const Mamba2InnerParams&, int device, Stream);

}  // namespace tilewright::scan
