// The CPU step: coefficients here, the sweeps at the level of the machine.
#include "optim/update.h"

#include <vector>

#include "optim/coefficients.h"

#if !TILEWRIGHT_EMULATED  // an emulated build holds no CPU kernels

namespace tilewright::optim {

double squared_norm(const UpdateParams& p, int threads) {
  const int64_t chunks = (p.num_tiles + kTilesPerChunk - 1) / kTilesPerChunk;
  std::vector<double> partial(static_cast<size_t>(chunks));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (chunks > 1)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    partial[size_t(chunk)] = TW_CALL_CPU(squared_norm_cpu, p, chunk);
  }
  double total = 0;
  for (double part : partial) total += part;
  return total;
}

void step_cpu(const UpdateParams& p, const Group* groups, const StepParams& params, int threads) {
  if (params.found_inf != nullptr && *params.found_inf != 0.0f) return;
  const double squared = params.max_grad_norm >= 0 ? squared_norm(p, threads) : 0.0;
  for (int64_t i = 0; i < p.num_rows; ++i) {
    const Row& row = p.rows[i];
    *row.step += 1;
    p.coefficients[i] = coefficients(p.algorithm, groups[row.group], row.id, *row.step, params, squared);
  }
  TW_CALL_CPU(update_cpu, p, threads);
}

}  // namespace tilewright::optim

#endif
