// Scores of groups of weights, and masks of what is kept.
#include <vector>

#include "bindings/arguments.h"
#include "bindings/families.h"
#include "core/dispatch.h"
#include "prune/scores.h"
#include "prune/select.h"

namespace tilewright {
namespace {

using namespace prune;

struct Weight {
  Matrix matrix;
  int64_t rows, columns;
  DType dtype;
  Device device;
};

// A tensor (rows, columns) of floats, in any layout.
Weight read_weight(Arguments& arguments, py::handle object, Label name) {
  const TensorView v = arguments.tensor(object, name);
  check_type(is_real(v.dtype), name, ": got dtype ", v.dtype,
             ", allowed: float32, float16, bfloat16, and float64 on a CPU");
  check_value(v.ndim == 2, name, ": must have shape (rows, columns), got ", v.sizes());
  if (runs_on_gpu(v) && v.dtype == DType::kFloat64) {
    fail(ErrorKind::kNotImplemented, name, ": float64 has no CUDA kernel: move the tensors to the CPU");
  }
  return {{v.data, v.stride(0), v.stride(1)}, v.shape[0], v.shape[1], v.dtype, v.device};
}

DType real_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

uint8_t* read_mask(Arguments& arguments, py::handle object, int64_t numel, Device device) {
  const TensorView v = arguments.tensor(object, "mask", Access::kOverwrite);
  check_dtype(v, DType::kBool, "mask");
  check_device(v, device, "mask");
  check_numel(v, numel, "mask");
  if (numel > 0) check_contiguous(v, "mask");
  return static_cast<uint8_t*>(v.data);
}

int32_t* read_invalid(Arguments& arguments, py::handle object, Device device) {
  return static_cast<int32_t*>(arguments.flat(object, "invalid", 1, DType::kInt32, device));
}

void* read_workspace(Arguments& arguments, py::handle object, int64_t bytes, Device device) {
  const TensorView v = arguments.tensor(object, "workspace", Access::kOverwrite);
  check_dtype(v, DType::kUInt8, "workspace");
  check_device(v, device, "workspace");
  check_value(v.numel() >= bytes, "workspace: got ", v.numel(), " bytes, expected ", bytes);
  return v.data;
}

GroupScoresParams group_scores_params(const Weight& w, int64_t group_rows, int64_t group_columns, int score) {
  check_value(group_rows >= 1 && group_columns >= 1, "group: got ", group_rows, " x ", group_columns,
              ", expected at least 1 x 1");
  check_value(score >= 0 && score <= int(Score::kProducts), "score: got ", score);
  GroupScoresParams p{};
  p.weight = w.matrix;
  p.rows = w.rows, p.columns = w.columns;
  p.group_rows = group_rows, p.group_columns = group_columns;
  p.score = Score(score);
  p.dtype = w.dtype;
  return p;
}

int64_t prune_group_scores_workspace(py::handle weight, int64_t group_rows, int64_t group_columns) {
  Arguments arguments;
  return group_scores_workspace(
      group_scores_params(read_weight(arguments, weight, "weight"), group_rows, group_columns, 0));
}

void prune_group_scores(py::handle weight, py::handle gradient, py::handle factors, py::handle scores,
                        py::handle workspace, int64_t group_rows, int64_t group_columns, int score,
                        double power, [[maybe_unused]] int threads) {
  Arguments arguments;
  const Weight w = read_weight(arguments, weight, "weight");
  GroupScoresParams p = group_scores_params(w, group_rows, group_columns, score);
  p.power = power;
  if (p.score == Score::kProducts) {
    const Weight g = read_weight(arguments, gradient, "gradient");
    check_type(g.dtype == w.dtype, "gradient: got dtype ", g.dtype, ", expected ", w.dtype);
    check_value(g.rows == w.rows && g.columns == w.columns && g.device == w.device,
                "gradient: must have the weight's shape and device");
    p.gradient = g.matrix;
  }
  const DType real = real_of(w.dtype);
  p.factors = arguments.flat(factors, "factors", p.columns, real, w.device);
  const int64_t groups = divide_up(p.rows, group_rows) * divide_up(p.columns, group_columns);
  p.scores = arguments.flat(scores, "scores", groups, real, w.device);
  p.workspace = read_workspace(arguments, workspace, group_scores_workspace(p), w.device);
  if (groups == 0) return;
  [[maybe_unused]] const Stream stream = arguments.current_stream(w.device);
  py::gil_scoped_release released;
  TW_RUN(w.device.is_cuda, TW_CALL_CPU(group_scores_cpu, p, threads),
         group_scores_cuda(p, w.device.index, stream));
}

void prune_random_scores(py::handle scores, uint64_t seed, uint32_t stream_number,
                         [[maybe_unused]] int threads) {
  Arguments arguments;
  const TensorView v = arguments.tensor(scores, "scores", Access::kOverwrite);
  RandomScoresParams p{};
  p.scores = static_cast<float*>(arguments.flat(scores, "scores", v.numel(), DType::kFloat32, v.device));
  p.count = v.numel();
  p.seed = seed;
  p.stream = stream_number;
  if (p.count == 0) return;
  [[maybe_unused]] const Stream stream = arguments.current_stream(v.device);
  py::gil_scoped_release released;
  TW_RUN(v.device.is_cuda, TW_CALL_CPU(random_scores_cpu, p, threads),
         random_scores_cuda(p, v.device.index, stream));
}

void prune_select_groups(py::handle weight, py::handle factors, py::handle mask, py::handle invalid, int n,
                         int m, [[maybe_unused]] int threads) {
  Arguments arguments;
  const Weight w = read_weight(arguments, weight, "weight");
  check_value(1 <= n && n < m && m <= kLargestGroup, "n, m: got ", n, ":", m,
              ", allowed: 1 <= n < m <= ", kLargestGroup);
  check_value(w.columns % m == 0, "weight: its ", w.columns, " columns are no multiple of ", m);
  SelectGroupsParams p{};
  p.weight = w.matrix;
  p.rows = w.rows, p.columns = w.columns;
  p.n = n, p.m = m;
  p.dtype = w.dtype;
  p.factors = arguments.flat(factors, "factors", p.columns, real_of(w.dtype), w.device);
  p.mask = read_mask(arguments, mask, p.rows * p.columns, w.device);
  p.invalid = read_invalid(arguments, invalid, w.device);
  if (p.rows * p.columns == 0) return;
  [[maybe_unused]] const Stream stream = arguments.current_stream(w.device);
  py::gil_scoped_release released;
  TW_RUN(w.device.is_cuda, TW_CALL_CPU(select_groups_cpu, p, threads),
         select_groups_cuda(p, w.device.index, stream));
}

void prune_select_rows(py::handle scores, py::handle factors, py::handle mask, py::handle invalid,
                       py::handle workspace, int64_t kept, int threads) {
  Arguments arguments;
  const Weight w = read_weight(arguments, scores, "scores");
  check_value(0 <= kept && kept <= w.columns, "kept: got ", kept, ", allowed: 0 to ", w.columns);
  SelectRowsParams p{};
  p.scores = w.matrix;
  p.rows = w.rows, p.columns = w.columns, p.kept = kept;
  p.dtype = w.dtype;
  p.factors = arguments.flat(factors, "factors", p.columns, real_of(w.dtype), w.device);
  p.mask = read_mask(arguments, mask, p.rows * p.columns, w.device);
  p.invalid = read_invalid(arguments, invalid, w.device);
  p.workspace = read_workspace(arguments, workspace,
                               select_rows_workspace(w.device.is_cuda ? 0 : p.columns, threads), w.device);
  if (p.rows * p.columns == 0) return;
  [[maybe_unused]] const Stream stream = arguments.current_stream(w.device);
  py::gil_scoped_release released;
  TW_RUN(w.device.is_cuda, TW_CALL_CPU(select_rows_cpu, p, threads),
         select_rows_cuda(p, w.device.index, stream));
}

// The sources of a selection; masks are None where only the workspace is asked for.
std::vector<SelectSource> read_sources(Arguments& arguments, const py::list& scores, const py::object& masks,
                                       Device& device) {
  std::vector<SelectSource> sources;
  int64_t elements = 0;
  for (size_t i = 0; i < scores.size(); ++i) {
    const Label name("scores", int64_t(i), "tensor");
    const Weight w = read_weight(arguments, scores[i], name);
    if (i == 0) device = w.device;
    check_value(w.device == device, name, ": is on ", w.device, ", expected ", device);
    uint8_t* mask = masks.is_none()
                        ? nullptr
                        : read_mask(arguments, py::cast<py::list>(masks)[i], w.rows * w.columns, device);
    elements += w.rows * w.columns;
    if (w.rows * w.columns > 0) sources.push_back({w.matrix, mask, w.rows, w.columns, w.dtype});
  }
  for (const SelectSource& source : sources)
    check_type((source.dtype == DType::kFloat64) == (sources[0].dtype == DType::kFloat64),
               "scores: float64 and other dtypes cannot be compared");
  check_value(elements <= kMostSelected, "scores: got ", elements, " elements, allowed: at most ",
              kMostSelected);
  return sources;
}

int64_t workspace_of([[maybe_unused]] Device device, const SelectParams& p) {
  int64_t bytes = 0;
  TW_RUN(device.is_cuda, void(bytes = TW_CALL_CPU(select_workspace_cpu, p)),
         void(bytes = select_workspace_cuda(p)));
  return bytes;
}

int64_t prune_select_workspace(const py::list& scores, int threads) {
  Arguments arguments;
  Device device;
  const std::vector<SelectSource> sources = read_sources(arguments, scores, py::none(), device);
  return workspace_of(device, {sources.data(), int64_t(sources.size()), 0, nullptr, nullptr, threads});
}

void prune_select(const py::list& scores, const py::list& masks, py::handle invalid, py::handle workspace,
                  int64_t kept, int threads) {
  Arguments arguments;
  Device device;
  const std::vector<SelectSource> sources = read_sources(arguments, scores, masks, device);
  int64_t elements = 0;
  for (const SelectSource& source : sources) elements += source.rows * source.columns;
  if (sources.empty()) return;
  check_value(1 <= kept && kept <= elements, "kept: got ", kept, ", allowed: 1 to ", elements);
  SelectParams p{sources.data(), int64_t(sources.size()), kept, nullptr, nullptr, threads < 1 ? 1 : threads};
  p.invalid = read_invalid(arguments, invalid, device);
  p.workspace = read_workspace(arguments, workspace, workspace_of(device, p), device);
  [[maybe_unused]] const Stream stream = arguments.current_stream(device);
  py::gil_scoped_release released;
  TW_RUN(device.is_cuda, TW_CALL_CPU(select_cpu, p), select_cuda(p, device.index, stream));
}

void prune_expand(py::handle units, py::handle mask, int64_t group_rows, int64_t group_columns,
                  [[maybe_unused]] int threads) {
  Arguments arguments;
  const TensorView v = arguments.tensor(mask, "mask");
  check_value(v.ndim == 2, "mask: must have shape (rows, columns), got ", v.sizes());
  check_value(group_rows >= 1 && group_columns >= 1, "group: got ", group_rows, " x ", group_columns,
              ", expected at least 1 x 1");
  ExpandParams p{};
  p.rows = v.shape[0], p.columns = v.shape[1];
  p.group_rows = group_rows, p.group_columns = group_columns;
  p.mask = read_mask(arguments, mask, v.numel(), v.device);
  p.units = static_cast<const uint8_t*>(
      arguments.flat(units, "units", divide_up(p.rows, group_rows) * divide_up(p.columns, group_columns),
                     DType::kBool, v.device));
  if (v.numel() == 0) return;
  [[maybe_unused]] const Stream stream = arguments.current_stream(v.device);
  py::gil_scoped_release released;
  TW_RUN(v.device.is_cuda, TW_CALL_CPU(expand_cpu, p, threads), expand_cuda(p, v.device.index, stream));
}

}  // namespace

void bind_prune_masks(py::module_& m) {
  m.def("prune_group_scores_workspace", &prune_group_scores_workspace,
        "Bytes that prune_group_scores needs.");
  m.def("prune_group_scores", &prune_group_scores, "Writes the score of each group of weights.");
  m.def("prune_random_scores", &prune_random_scores, "Writes random numbers, by seed and position.");
  m.def("prune_select_groups", &prune_select_groups, "Keeps n of each m neighbours.");
  m.def("prune_select_rows", &prune_select_rows, "Keeps the best of each row.");
  m.def("prune_select_workspace", &prune_select_workspace, "Bytes that prune_select needs.");
  m.def("prune_select", &prune_select, "Keeps the best of all tensors.");
  m.def("prune_expand", &prune_expand, "Gives each element what is said of its group.");
}

}  // namespace tilewright
