// The scans; each op has a file of its own beside this one.
#include "bindings/families.h"

namespace tilewright {

void bind_scan(pybind11::module_& m) {
  bind_causal_conv1d(m);
  bind_gated_rms_norm(m);
  bind_linear_scan(m);
  bind_mamba_step(m);
  bind_mamba2_inner(m);
  bind_matmul(m);
  bind_selective_scan(m);
  bind_selective_state_update(m);
  bind_ssd_chunk_scan(m);
}

}  // namespace tilewright
