// The order of a decode step, on either device.
#include "scan/mamba_step.h"

namespace tilewright::scan {

#if !TILEWRIGHT_EMULATED

void mamba_step_cpu(const MambaStepParams& p, int threads) {
  TW_CALL_CPU(token_linear_cpu, p.in, threads);
  TW_CALL_CPU(causal_conv1d_update_cpu, p.conv, threads);
  TW_CALL_CPU(token_linear_cpu, p.dt_B_C, threads);
  if (p.has_norms) TW_CALL_CPU(segment_norm_cpu, p.norms, threads);
  TW_CALL_CPU(token_linear_cpu, p.dt, threads);
  TW_CALL_CPU(selective_state_update_cpu, p.scan, threads);
  TW_CALL_CPU(token_linear_cpu, p.out, threads);
}

#endif

#if TILEWRIGHT_EMULATED || TILEWRIGHT_CUDA

void mamba_step_cuda(const MambaStepParams& p, int device, Stream stream) {
  token_linear_cuda(p.in, device, stream);
  causal_conv1d_update_cuda(p.conv, device, stream);
  token_linear_cuda(p.dt_B_C, device, stream);
  if (p.has_norms) segment_norm_cuda(p.norms, device, stream);
  token_linear_cuda(p.dt, device, stream);
  selective_state_update_cuda(p.scan, device, stream);
  token_linear_cuda(p.out, device, stream);
}

#endif

}  // namespace tilewright::scan
