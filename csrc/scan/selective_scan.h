// The selective scan of Mamba (arXiv:2312.00752), for every channel d and state n of a sequence:
//
//   dt = delta + bias, through softplus if asked
//   h[t, n] = exp(dt[t] A[n]) h[t-1, n] + dt[t] B[t, n] u[t]
//   y[t] = sum_n C[t, n] h[t, n] + D u[t]                      (complex: twice the real part)
//   out[t] = y[t] silu(z[t])
//
// and its gradient. A step s of a sequence visits one token: s itself, the mirrored one (reverse), order[s],
// or order mirrored. Packed sequences lie one behind the other along the steps of batch 0.
//
// The state at the start of every chunk of kScanChunk steps is kept for the backward pass. Chunks are counted
// from each sequence's own start; chunk c of sequence s has the number chunk_base(s) + c.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace tilewright::scan {

constexpr int32_t kScanChunk = 64;  // steps between kept states
constexpr int32_t kMaxStates = 256;

// A tensor (batch, channel or group, state, step), strides in elements; axes it does not have have stride 0.
struct Strided {
  void* data;  // null: absent
  int64_t batch, channel, state, step;
};

struct SelectiveScanParams {
  Strided u, delta, z, out;  // (batch, dim, step) of dtype
  Strided A;                 // (dim, state) of weight_dtype
  // Variable: (batch, group, state, step) of dtype, for complex A (batch, group, state, 2 * step) interleaved
  // re, im along the last axis. Constant: (dim, state) of weight_dtype.
  Strided B, C;
  const void* D;           // [dim] of real weight type, contiguous; null: absent
  const void* delta_bias;  // [dim] likewise
  // (sequence, dim, state) of weight_dtype, contiguous; null: zeros / not wanted.
  const void* initial_state;
  void* last_state;
  // [chunk][state][dim] of weight_dtype: the states before each chunk; null in a forward pass without
  // gradient.
  void* chunk_states;

  // Backward only. Gradients have their tensors' dtype and any strides; those of weights are of the weight's
  // dtype and contiguous. Null: not wanted. None of them needs to be zeroed before.
  Strided dout;             // (batch, dim, step)
  const void* dlast_state;  // null: zero
  Strided du, ddelta, dz;   // (batch, dim, step)
  void *dA, *dD, *ddelta_bias, *dinitial_state;
  Strided dB, dC;   // shaped and typed as B and C
  void* workspace;  // workspace_bytes() of scratch

  const int64_t* cu_seqlens;  // [sequences + 1], where packed sequences start and end; null: one per batch
  const int64_t* order;       // [order_batch stride][length]: the token visited at each step; null: identity
  int64_t order_stride;       // between batches, 0 if shared
  int64_t batch, dim, length, groups, sequences;
  int32_t states;      // per channel, 1 to kMaxStates
  DType dtype;         // float32, float16, bfloat16; float64 on the CPU
  DType weight_dtype;  // float32 or complex64; float64 or complex128 where dtype is float64
  bool variable_B, variable_C, softplus, reverse;
};

// Where a sequence's chunks start in chunk_states. Sequences of one batch row, or packed ones.
constexpr int64_t chunk_base(int64_t sequence, int64_t start, bool packed, int64_t length) {
  return packed ? start / kScanChunk + sequence : sequence * ((length + kScanChunk - 1) / kScanChunk);
}

// Chunks that chunk_states has room for.
constexpr int64_t chunk_count(int64_t batch, int64_t length, int64_t sequences, bool packed) {
  return packed ? length / kScanChunk + sequences : batch * ((length + kScanChunk - 1) / kScanChunk);
}

int64_t selective_scan_workspace_cuda(const SelectiveScanParams&, bool backward, int device);  // bytes
void selective_scan_fwd_cuda(const SelectiveScanParams&, int device, Stream);
void selective_scan_bwd_cuda(const SelectiveScanParams&, int device, Stream);

}  // namespace tilewright::scan

namespace tilewright {
TW_DECLARE_CPU(int64_t, selective_scan_workspace_cpu,
               (const scan::SelectiveScanParams&, bool backward, int threads))
TW_DECLARE_CPU(void, selective_scan_fwd_cpu, (const scan::SelectiveScanParams&, int threads))
TW_DECLARE_CPU(void, selective_scan_bwd_cpu, (const scan::SelectiveScanParams&, int threads))
}  // namespace tilewright
