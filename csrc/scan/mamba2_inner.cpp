// The order of a Mamba-2 block's kernels, on either device.
#include "scan/mamba2_inner.h"

namespace tilewright::scan {
namespace {

int64_t largest(int64_t a, int64_t b, int64_t c) { return larger(a, larger(b, c)); }

}  // namespace

#if !TILEWRIGHT_EMULATED

int64_t mamba2_inner_workspace_cpu(const Mamba2InnerParams& p, bool backward, int threads) {
  if (!backward) {
    return largest(causal_conv1d_workspace_cpu(p.conv, false),
                   TW_CALL_CPU(ssd_chunk_scan_fwd_workspace_cpu, p.scan, threads), 0);
  }
  return largest(causal_conv1d_workspace_cpu(p.conv, true),
                 TW_CALL_CPU(ssd_chunk_scan_bwd_workspace_cpu, p.scan, threads),
                 p.norm.weight == nullptr ? 0 : gated_rms_norm_workspace(p.norm, false));
}

void mamba2_inner_fwd_cpu(const Mamba2InnerParams& p, int threads) {
  if (p.in.c != nullptr) matmul(p.in, threads);
  TW_CALL_CPU(causal_conv1d_fwd_cpu, p.conv, threads);
  TW_CALL_CPU(ssd_chunk_scan_fwd_cpu, p.scan, threads);
  if (p.norm.weight != nullptr) TW_CALL_CPU(gated_rms_norm_fwd_cpu, p.norm, threads);
  if (p.out.c != nullptr) matmul(p.out, threads);
}

void mamba2_inner_bwd_cpu(const Mamba2InnerParams& p, int threads) {
  if (p.dinner.c != nullptr) matmul(p.dinner, threads);
  if (p.dout_weight.c != nullptr) matmul(p.dout_weight, threads);
  if (p.norm.weight != nullptr) TW_CALL_CPU(gated_rms_norm_bwd_cpu, p.norm, threads);
  if (p.differentiates_scan) TW_CALL_CPU(ssd_chunk_scan_bwd_cpu, p.scan, threads);
  if (p.differentiates_conv) TW_CALL_CPU(causal_conv1d_bwd_cpu, p.conv, threads);
  if (p.dinput.c != nullptr) matmul(p.dinput, threads);
  if (p.din_weight.c != nullptr) matmul(p.din_weight, threads);
}

#endif

#if TILEWRIGHT_EMULATED || TILEWRIGHT_CUDA

int64_t mamba2_inner_workspace_cuda(const Mamba2InnerParams& p, bool backward, int device) {
  return largest(causal_conv1d_workspace_cuda(p.conv, backward, device),
                 ssd_chunk_scan_workspace_cuda(p.scan, backward),
                 backward && p.norm.weight != nullptr ? gated_rms_norm_workspace(p.norm, true) : 0);
}

void mamba2_inner_fwd_cuda(const Mamba2InnerParams& p, int device, Stream stream) {
  causal_conv1d_fwd_cuda(p.conv, device, stream);
  ssd_chunk_scan_fwd_cuda(p.scan, device, stream);
  if (p.norm.weight != nullptr) gated_rms_norm_fwd_cuda(p.norm, device, stream);
}

void mamba2_inner_bwd_cuda(const Mamba2InnerParams& p, int device, Stream stream) {
  if (p.norm.weight != nullptr) gated_rms_norm_bwd_cuda(p.norm, device, stream);
  if (p.differentiates_scan) ssd_chunk_scan_bwd_cuda(p.scan, device, stream);
  if (p.differentiates_conv) causal_conv1d_bwd_cuda(p.conv, device, stream);
}

#endif

}  // namespace tilewright::scan
