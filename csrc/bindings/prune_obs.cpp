// The optimal brain surgeon's step.
#include "prune/obs.h"

#include "bindings/arguments.h"
#include "bindings/families.h"
#include "core/dispatch.h"

namespace tilewright {
namespace {

using prune::ObsParams;

// A tensor of this shape whose rows are contiguous; returns its memory and sets the stride of its rows.
void* read_rows(Arguments& arguments, py::handle object, Label name, int64_t rows, int64_t columns,
                DType dtype, Device device, int64_t& stride) {
  const TensorView v = arguments.tensor(object, name);
  check_dtype(v, dtype, name);
  check_device(v, device, name);
  check_value(v.ndim == 2 && v.shape[0] == rows && v.shape[1] == columns, name, ": got shape ", v.sizes(),
              ", expected (", rows, ", ", columns, ")");
  check_value(columns <= 1 || v.stride(1) == 1, name, ": its rows must be contiguous");
  stride = v.stride(0);
  return v.data;
}

void prune_obs_panel(py::handle weight, py::handle factor, py::handle mask, py::handle errors, int n, int m,
                     [[maybe_unused]] int threads) {
  Arguments arguments;
  const TensorView w = arguments.tensor(weight, "weight");
  const bool on_gpu = runs_on_gpu(w);
  check_type(w.dtype == DType::kFloat32 || (w.dtype == DType::kFloat64 && !on_gpu), "weight: got dtype ",
             w.dtype, ", allowed: float32, and float64 on a CPU");
  check_value(w.ndim == 2 && w.shape[1] <= prune::kWidestPanel, "weight: got shape ", w.sizes(),
              ", expected two axes and at most ", prune::kWidestPanel, " columns");
  ObsParams p{};
  p.rows = w.shape[0];
  p.columns = int32_t(w.shape[1]);
  p.n = n, p.m = m;
  p.dtype = w.dtype;
  check_value(m == 0 || (1 <= n && n < m && m <= prune::kLargestObsGroup && p.columns % m == 0), "n, m: got ",
              n, ":", m, " for ", p.columns, " columns");
  p.weight = read_rows(arguments, weight, "weight", p.rows, p.columns, w.dtype, w.device, p.weight_row);
  p.factor = read_rows(arguments, factor, "factor", p.columns, p.columns, w.dtype, w.device, p.factor_row);
  p.mask = static_cast<uint8_t*>(
      read_rows(arguments, mask, "mask", p.rows, p.columns, DType::kBool, w.device, p.mask_row));
  p.errors = read_rows(arguments, errors, "errors", p.rows, p.columns, w.dtype, w.device, p.errors_row);
  if (p.rows * p.columns == 0) return;
  [[maybe_unused]] const Stream stream = arguments.current_stream(w.device);
  py::gil_scoped_release released;
  TW_RUN(w.device.is_cuda, TW_CALL_CPU(obs_panel_cpu, p, threads), obs_panel_cuda(p, w.device.index, stream));
}

}  // namespace

void bind_prune_obs(py::module_& m) {
  m.def("prune_obs_panel", &prune_obs_panel,
        "Removes weights of a panel; the others of a row make up for them.");
}

}  // namespace tilewright
