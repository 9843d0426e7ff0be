// One step of a selective scan for every sequence, its state updated in place (decoding). For head h, channel
// p of it and state n, and the head's group g:
//
//   dt = dt + dt_bias, through softplus if asked
//   state[h, p, n] = exp(dt[h, p] A[h, p, n]) state[h, p, n] + dt[h, p] B[g, n] x[h, p]
//   out[h, p] = (sum_n C[g, n] state[h, p, n] + D[h, p] x[h, p]) silu(z[h, p])
//
// Mamba-1 is one head of all channels. Mamba-2 has one A, D, dt and dt_bias a head: tensors expanded along p
// and n, with strides of 0, and one exponential for all of a channel's states.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace tilewright::scan {

// A tensor (batch or slot, head or group, channel, state) of any real dtype, strides in elements; an axis
// that it does not have has stride 0.
struct StepTensor {
  void* data;  // null: absent
  int64_t batch, head, channel, state;
  DType dtype;
};

struct SelectiveStateUpdateParams {
  StepTensor state;          // (slot, head, channel, state)
  StepTensor x, dt, z, out;  // (batch, head, channel)
  StepTensor A;              // (head, channel, state); log(-A) if A_is_log
  StepTensor B, C;           // (batch, group, state)
  StepTensor D, dt_bias;     // (head, channel)
  const void* indices;       // [batch] int32 or int64, the slot of each sequence; null: its own number
  int64_t indices_stride;
  int64_t batch, slots, heads, groups, dim, states;  // groups divides heads; dim channels a head
  bool indices_are_64, softplus, A_is_log;
};

void selective_state_update_cuda(const SelectiveStateUpdateParams&, int device, Stream);

}  // namespace tilewright::scan

namespace tilewright {
TW_DECLARE_CPU(void, selective_state_update_cpu, (const scan::SelectiveStateUpdateParams&, int threads))
}  // namespace tilewright
