// The optimal brain surgeon's step on the CPU; compiled once per instruction-set level.
//
// Roofline: rows are independent and stay in the L1 cache for all of their columns; a removed weight costs
// two operations for each column to its right. The product with the columns beyond the panel is what takes
// the time.
#include "core/integers.h"
#include "core/threads.h"
#include "prune/obs.h"

namespace tilewright::TW_ISA {
namespace {

using namespace ::tilewright::prune;

constexpr int64_t kBatch = 16;  // rows of a unit of work

template <class R>
struct Panel {
  const ObsParams& p;

  const R* factor(int64_t i) const { return static_cast<const R*>(p.factor) + i * p.factor_row; }

  void choose(const R* w, int64_t first, uint8_t* mask) const {
    R worth[kLargestObsGroup];
    for (int i = 0; i < p.m; ++i) {
      const R error = w[first + i] / factor(first + i)[first + i];
      worth[i] = error * error;
    }
    for (int i = 0; i < p.m; ++i) {
      int rank = 0;
      for (int j = 0; j < p.m; ++j) rank += worth[j] > worth[i] || (worth[j] == worth[i] && j < i);
      mask[first + i] = rank < p.n;
    }
  }

  void run(int64_t row) const {
    R* w = static_cast<R*>(p.weight) + row * p.weight_row;
    R* errors = static_cast<R*>(p.errors) + row * p.errors_row;
    uint8_t* mask = p.mask + row * p.mask_row;
    for (int64_t i = 0; i < p.columns; ++i) {
      if (p.m > 0 && i % p.m == 0) choose(w, i, mask);
      errors[i] = 0;
      if (mask[i]) continue;
      const R* u = factor(i);
      const R error = w[i] / u[i];
      errors[i] = error;
      w[i] = 0;
      for (int64_t j = i + 1; j < p.columns; ++j) w[j] -= error * u[j];
    }
  }
};

template <class R>
void run(const ObsParams& p, int threads) {
  const Panel<R> panel{p};
  parallel_chunks(divide_up(p.rows, kBatch), threads, [&](int64_t chunk) {
    for (int64_t row = chunk * kBatch; row < smaller((chunk + 1) * kBatch, p.rows); ++row) panel.run(row);
  });
}

}  // namespace

void obs_panel_cpu(const ObsParams& p, int threads) {
  p.dtype == DType::kFloat64 ? run<double>(p, threads) : run<float>(p, threads);
}

}  // namespace tilewright::TW_ISA
