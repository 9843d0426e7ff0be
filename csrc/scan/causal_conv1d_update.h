// Decoding with the causal convolution: the next steps of every sequence, and its state, updated in place.
//
// A state holds the last `state_length` >= width - 1 steps of a sequence, oldest first, and moves up by the
// steps that come in. With cache_seqlens it is a ring instead: step number cache_seqlens + s is written to
// position (cache_seqlens + s) mod state_length, and nothing moves.
#pragma once

#include "scan/causal_conv1d.h"

namespace tilewright::scan {

struct CausalConv1dUpdateParams {
  // x and out (batch, dim, steps), weight, bias, sizes and options; no states, no seq_idx.
  CausalConv1dParams conv;
  ConvTensor state;  // (slot, channel, position) of conv.dtype
  int64_t slots, state_length;
  const void* cache_seqlens;  // [batch] int32 or int64; null: no ring
  int64_t cache_stride;
  const void*
      indices;  // [batch] int32 or int64, the slot of each sequence, negative: none; null: its own number
  int64_t indices_stride;
  bool cache_is_64, indices_are_64;
};

void causal_conv1d_update_cuda(const CausalConv1dUpdateParams&, int device, Stream);

}  // namespace tilewright::scan

namespace tilewright {
TW_DECLARE_CPU(void, causal_conv1d_update_cpu, (const scan::CausalConv1dUpdateParams&, int threads))
}  // namespace tilewright
