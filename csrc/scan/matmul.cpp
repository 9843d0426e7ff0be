// Which kernel a dense product on the CPU is for.
#include "scan/matmul.h"

#include <memory>
#include <new>

#include "scan/mamba_step.h"

namespace tilewright::scan {

#if !TILEWRIGHT_EMULATED

namespace {

// Rows so few that reading the weight is the work: it is read once, as it lies.
constexpr int64_t kTokens = 4;
constexpr std::align_val_t kAlignment{64};

struct Release {
  void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
};

TokenLinearParams token_linear(const MatmulParams& p) {
  TokenLinearParams linear{};
  linear.x = p.a, linear.weight = p.b, linear.bias = p.bias, linear.out = p.c;
  linear.x_row = p.a_row, linear.weight_row = p.b_column, linear.weight_column = 1;
  linear.bias_row = 1, linear.out_row = p.c_row;
  linear.tokens = p.m, linear.rows = p.n, linear.columns = p.k;
  linear.dtype = DType::kFloat32;
  return linear;
}

}  // namespace

void matmul(const MatmulParams& given, int threads) {
  MatmulParams p = given;
  if (p.m == 0 || p.n == 0) return;
  if (p.m <= kTokens && p.a_k == 1 && p.b_k == 1) {
    TW_CALL_CPU(token_linear_cpu, token_linear(p), threads);
    return;
  }
  const int64_t bytes = TW_CALL_CPU(matmul_workspace_cpu, p, threads);
  const std::unique_ptr<void, Release> workspace(::operator new(size_t(bytes), kAlignment));
  p.workspace = workspace.get();
  TW_CALL_CPU(matmul_cpu, p, threads);
}

#endif

}  // namespace tilewright::scan
