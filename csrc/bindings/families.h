// What module.cpp assembles: one function a family.
#pragma once

#include <pybind11/pybind11.h>

namespace tilewright {

void bind_attention(pybind11::module_& m);
void bind_optim(pybind11::module_& m);
void bind_prune(pybind11::module_& m);
void bind_scan(pybind11::module_& m);

// Of the attention family, called by bind_attention.
void bind_block_mask(pybind11::module_& m);
void bind_block_sparse(pybind11::module_& m);
void bind_select_blocks(pybind11::module_& m);

// Of the pruning family, called by bind_prune.
void bind_activation_sparse(pybind11::module_& m);
void bind_block_sparse_linear(pybind11::module_& m);
void bind_prune_masks(pybind11::module_& m);
void bind_prune_obs(pybind11::module_& m);
void bind_semi_structured(pybind11::module_& m);

// Of the scan family, called by bind_scan.
void bind_causal_conv1d(pybind11::module_& m);
void bind_gated_rms_norm(pybind11::module_& m);
void bind_linear_scan(pybind11::module_& m);
void bind_mamba_step(pybind11::module_& m);
void bind_mamba2_inner(pybind11::module_& m);
void bind_matmul(pybind11::module_& m);
void bind_selective_scan(pybind11::module_& m);
void bind_selective_state_update(pybind11::module_& m);
void bind_ssd_chunk_scan(pybind11::module_& m);

namespace emulator {
void bind_selftest(pybind11::module_& m);
}

}  // namespace tilewright
