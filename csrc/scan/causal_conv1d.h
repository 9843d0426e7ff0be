// The causal depthwise convolution that precedes a selective scan, for every channel d of a sequence:
//
//   pre[t] = bias + sum_j weight[width - 1 - j] x[t - j],   j = 0 .. width - 1, "the lag"
//   out[t] = pre[t], or silu(pre[t])
//
// and its gradient, which computes pre again. What lies before the first step is initial[width - 1 + t], or
// zero; `final` is what lies before step `length`, in the same order. With seq_idx a tap counts only where
// its step belongs to the same sequence as step t; the initial state belongs to the sequence of step 0, the
// final state to that of the last step; and a step with a negative number is padding: its output is 0 and no
// other step sees it.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace tilewright::scan {

constexpr int32_t kMaxConvWidth = 8;
// Steps whose dweight and dbias a CPU sums up in one go: as many as keep the prefetchers on one row, fewer
// where a step is a row.
constexpr int64_t kConvRowChunk = 2048, kConvColumnChunk = 512;

// A tensor (batch, channel, step), strides in elements. Of a state the step is 0 .. width - 2.
struct ConvTensor {
  void* data;  // null: absent
  int64_t batch, channel, step;
};

struct CausalConv1dParams {
  ConvTensor x, out;          // of dtype
  ConvTensor initial, final;  // of dtype
  const void* weight;         // (dim, width) of weight_dtype
  int64_t weight_channel, weight_tap;
  const void* bias;  // (dim) of weight_dtype
  int64_t bias_channel;
  const void* seq_idx;  // (batch, step), int64 or int32
  int64_t seq_batch, seq_step;

  // Backward only. Null: of dfinal zero, of a result not wanted. Nothing needs to be zeroed before.
  ConvTensor dout, dfinal, dx, dinitial;  // of dtype
  void *dweight, *dbias;                  // of weight_dtype, contiguous
  void* workspace;                        // workspace_bytes() of scratch

  int64_t batch, dim, length;  // length > 0
  int32_t width;               // taps, 1 to kMaxConvWidth
  DType dtype;                 // float32, float16, bfloat16; float64 on the CPU
  DType weight_dtype;          // float32, float16, bfloat16; float64 with dtype float64 and only then
  bool silu, seq_is_64;
};

// Partial sums of dweight and dbias: [batch * chunk][width + 1][dim] float32.
constexpr int64_t causal_conv1d_workspace_cpu(const CausalConv1dParams& p, bool backward) {
  const int64_t chunks = (p.length + kConvColumnChunk - 1) / kConvColumnChunk;  // of either kind, at most
  return backward ? p.batch * chunks * (p.width + 1) * p.dim * int64_t{4} : 0;
}

int64_t causal_conv1d_workspace_cuda(const CausalConv1dParams&, bool backward, int device);  // bytes
void causal_conv1d_fwd_cuda(const CausalConv1dParams&, int device, Stream);
void causal_conv1d_bwd_cuda(const CausalConv1dParams&, int device, Stream);

}  // namespace tilewright::scan

namespace tilewright {
TW_DECLARE_CPU(void, causal_conv1d_fwd_cpu, (const scan::CausalConv1dParams&, int threads))
TW_DECLARE_CPU(void, causal_conv1d_bwd_cpu, (const scan::CausalConv1dParams&, int threads))
}  // namespace tilewright
