// The scan of Mamba-2 (state space duality, arXiv:2405.21060). For every head of a sequence, with a state h
// of head_dim (p) times states (n):
//
//   dt = clamp(softplus(dt + bias))
//   h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]^T
//   y[t] = h[t] C[t] + D x[t]
//   out[t] = y[t] silu(z[t])
//
// and its gradient. Heads share B and C by groups. Packed sequences (cu_seqlens) lie one behind the other
// along the steps of batch 0; within a sequence the state is also dropped wherever seq_idx changes.
//
// Sequences are cut into chunks of kSsdChunk steps, counted from each sequence's own start; chunk c of
// sequence s has the number ssd_chunk_base(s) + c. Both passes need the state before each.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace tilewright::scan {

constexpr int32_t kSsdChunk = 64;

// A tensor (batch, step, head or group, inner), strides in elements; axes it does not have have stride 0.
struct SsdTensor {
  void* data;  // null: absent
  int64_t batch, step, head, inner;
};

struct SsdChunkScanParams {
  SsdTensor x, z, out;  // (batch, step, head, head_dim) of dtype
  SsdTensor y;     // the same; the result before the gate. Forward: null unless wanted. Backward: if z is.
  SsdTensor B, C;  // (batch, step, group, states) of dtype
  SsdTensor dt;    // (batch, step, head) of weight_dtype
  const void* A;   // [heads] of weight_dtype, as all weights
  const void* dt_bias;  // [heads]; null: absent
  const void* D;        // [heads] or [heads][head_dim], by D_wide; null: absent
  // (sequence, head, head_dim, states) of weight_dtype, contiguous; null: zeros / not wanted.
  const void* initial_state;
  void* final_state;
  // [chunk][head][states][head_dim] of weight_dtype: the state before each chunk. On a CPU written by the
  // forward pass and read by the backward pass; CUDA has them in the workspace, and computes them again.
  void* chunk_states;

  // Backward only. Gradients have their tensors' dtypes; those of weights and states are contiguous. Null:
  // not wanted. None of them needs to be zeroed before.
  SsdTensor dout, dx, dz;    // (batch, step, head, head_dim)
  SsdTensor dB, dC;          // (batch, step, group, states)
  SsdTensor ddt;             // (batch, step, head)
  const void* dfinal_state;  // null: zero
  void *dA, *dD, *ddt_bias, *dinitial_state;
  void* workspace;  // ssd_chunk_scan_workspace bytes of scratch

  const int64_t* seq_idx;     // [batch][length] contiguous; null: no changes
  const int64_t* cu_seqlens;  // [sequences + 1], where packed sequences start and end; null: one per batch
  int64_t batch, length, sequences;
  int32_t heads, groups, head_dim, states;
  double dt_min, dt_max;
  DType dtype;         // float32, float16, bfloat16; float64 on the CPU
  DType weight_dtype;  // float32; float64 where dtype is
  bool softplus, D_wide;
};

// A run of at most kSsdChunk steps of one sequence.
struct SsdChunk {
  int64_t batch, start, sequence;
  int32_t length;  // 0: a number that no chunk has
};

// dt A of a step. Where the decay is infinite, a number of which nothing is left either: sums of it stay
// finite, and with them the differences that later steps need.
static constexpr double ssd_log_decay(double dt, double rate) {
  constexpr double kNothingLeft = -1e5;
  const double decay = dt * rate;
  return decay < kNothingLeft ? kNothingLeft : decay;  // a NaN stays
}

// Positions are taken as they may be, so that wrong ones on a device cannot lead outside of the tensors.
static constexpr int64_t ssd_sequence_start(const SsdChunkScanParams& p, int64_t sequence) {
  if (p.cu_seqlens == nullptr) return 0;
  const int64_t position = p.cu_seqlens[sequence];
  return position < 0 ? 0 : position < p.length ? position : p.length;
}

static constexpr int64_t ssd_sequence_end(const SsdChunkScanParams& p, int64_t sequence) {
  return p.cu_seqlens == nullptr ? p.length : ssd_sequence_start(p, sequence + 1);
}

static constexpr int64_t ssd_chunk_base(const SsdChunkScanParams& p, int64_t sequence) {
  if (p.cu_seqlens == nullptr) return sequence * ((p.length + kSsdChunk - 1) / kSsdChunk);
  return ssd_sequence_start(p, sequence) / kSsdChunk + sequence;
}

// Numbers that chunks may have; of packed sequences not every number is a chunk's.
static constexpr int64_t ssd_chunk_count(const SsdChunkScanParams& p) {
  return p.cu_seqlens == nullptr ? p.batch * ((p.length + kSsdChunk - 1) / kSsdChunk)
                                 : p.length / kSsdChunk + p.sequences;
}

static constexpr SsdChunk ssd_chunk_at(const SsdChunkScanParams& p, int64_t sequence, int64_t index) {
  const int64_t start = ssd_sequence_start(p, sequence) + index * kSsdChunk;
  const int64_t left = ssd_sequence_end(p, sequence) - start;
  return {p.cu_seqlens == nullptr ? sequence : 0, start, sequence,
          left <= 0          ? 0
          : left < kSsdChunk ? int32_t(left)
                             : kSsdChunk};
}

static constexpr SsdChunk ssd_chunk(const SsdChunkScanParams& p, int64_t number) {
  int64_t low = 0, high = p.sequences;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (ssd_chunk_base(p, middle) <= number ? low : high) = middle;
  }
  return ssd_chunk_at(p, low, number - ssd_chunk_base(p, low));
}

// Whether the state is dropped before step t of a batch row, t not being a sequence's first.
static constexpr bool ssd_resets(const SsdChunkScanParams& p, int64_t batch, int64_t t) {
  return p.seq_idx != nullptr && p.seq_idx[batch * p.length + t] != p.seq_idx[batch * p.length + t - 1];
}

// Heads of a group are summed into dB and dC in blocks; how many blocks depends on the shape alone, so that
// the sums do. As many as give a machine `enough` to do, and one where there are chunks enough: every block
// does once more what its heads could share.
constexpr int64_t kSsdEnoughCpu = 16, kSsdEnoughCuda = 128, kSsdEnoughMma = 512;
static constexpr int32_t ssd_head_blocks(const SsdChunkScanParams& p, int64_t enough) {
  const int64_t without = ssd_chunk_count(p) * p.groups;
  const int32_t heads = p.heads / p.groups;
  const int64_t wanted = without > 0 ? (enough + without - 1) / without : 1;
  return wanted < heads ? int32_t(wanted) : heads;
}

int64_t ssd_chunk_scan_workspace_cuda(const SsdChunkScanParams&, bool backward);  // bytes
void ssd_chunk_scan_fwd_cuda(const SsdChunkScanParams&, int device, Stream);
void ssd_chunk_scan_bwd_cuda(const SsdChunkScanParams&, int device, Stream);

}  // namespace tilewright::scan

namespace tilewright {
TW_DECLARE_CPU(int64_t, ssd_chunk_scan_fwd_workspace_cpu, (const scan::SsdChunkScanParams&, int threads))
TW_DECLARE_CPU(int64_t, ssd_chunk_scan_bwd_workspace_cpu, (const scan::SsdChunkScanParams&, int threads))
TW_DECLARE_CPU(void, ssd_chunk_scan_fwd_cpu, (const scan::SsdChunkScanParams&, int threads))
TW_DECLARE_CPU(void, ssd_chunk_scan_bwd_cpu, (const scan::SsdChunkScanParams&, int threads))
}  // namespace tilewright
