// Decode caches: their memory, and the slot numbers of sequences, checked where they can be read.
#pragma once

#include "core/check.h"
#include "core/tensor.h"

namespace tilewright {

// Of an expanded state, one sequence would read what another has already written.
inline void check_written(const TensorView& state, const char* name) {
  for (int32_t axis = 0; state.numel() != 0 && axis < state.ndim; ++axis) {
    check_value(state.stride(axis) != 0 || state.shape[axis] <= 1, name,
                " must have a place of its own for each entry, since it is written to, got ",
                state.shape[axis], " entries in one place along axis ", axis, ": clone it");
  }
}

// A sequence's slot is below `slots`, or negative for padding; without indices there is one a sequence.
// Numbers on a GPU cannot be looked at without waiting for it: the kernels give NaN for those out of range.
inline void check_slots(const void* indices, int64_t stride, bool is_64, int64_t batch, int64_t slots,
                        bool on_gpu, const char* name, const char* state) {
  if (indices == nullptr) {
    check_value(batch == slots, state, " must have one entry a sequence, batch = ", batch, ", got ", slots,
                "; or give ", name);
    return;
  }
  for (int64_t b = 0; !on_gpu && b < batch; ++b) {
    const int64_t slot = is_64 ? static_cast<const int64_t*>(indices)[b * stride]
                               : static_cast<const int32_t*>(indices)[b * stride];
    check_value(slot < slots, name, " must be below ", slots, ", the slots of ", state, ", got ", slot,
                " for sequence ", b);
  }
}

}  // namespace tilewright
