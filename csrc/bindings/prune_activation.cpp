// The activation-sparse linear layer.
#include "bindings/arguments.h"
#include "bindings/families.h"
#include "core/dispatch.h"
#include "core/integers.h"
#include "prune/activation_sparse_linear.h"
#include "prune/select.h"

namespace tilewright {
namespace {

using prune::ActivationSparseLinearParams;
using prune::KeepInputsParams;

TensorView read_x(Arguments& arguments, py::handle object) {
  const TensorView x = arguments.tensor(object, "x");
  check_value(x.ndim == 2, "x: must have shape (tokens, in), got ", x.sizes());
  check_real(x, "x");
  return x;
}

uint8_t* read_keep(Arguments& arguments, py::handle object, const TensorView& x, Access access) {
  const TensorView keep = arguments.tensor(object, "keep", access);
  check_device(keep, x.device, "keep");
  check_dtype(keep, DType::kBool, "keep");
  check_value(keep.same_shape(x), "keep: must have shape (tokens, in) = ", x.sizes(), ", got ", keep.sizes());
  if (keep.numel() > 0) check_contiguous(keep, "keep");
  return static_cast<uint8_t*>(keep.data);
}

// All of the choice but where it goes.
KeepInputsParams read_choice(Arguments& arguments, const TensorView& x, py::handle scale,
                             py::handle threshold, int64_t count) {
  const DType wide = x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  KeepInputsParams p{};
  p.x = {x.data, x.stride(0), x.stride(1)};
  p.tokens = x.shape[0], p.in = x.shape[1], p.count = count;
  check_value(p.in < int64_t{1} << 31, "x: at most 2^31 - 1 inputs, got ", p.in);
  p.dtype = x.dtype;
  p.scale = arguments.flat(scale, "scale", p.in, wide, x.device);
  p.threshold = arguments.flat(threshold, "threshold", 1, wide, x.device);
  check_value(scale.is_none() != threshold.is_none(), "scale, threshold: one of them must be given");
  return p;
}

void run_choice(const KeepInputsParams& p, const TensorView& x, Stream stream, int threads) {
  (void)stream, (void)threads;
  if (p.tokens * p.in == 0) return;
  TW_RUN(x.device.is_cuda, TW_CALL_CPU(keep_inputs_cpu, p, threads),
         prune::keep_inputs_cuda(p, x.device.index, stream));
}

int64_t product_bytes(bool on_gpu, int64_t tokens, int64_t in, int64_t out, int64_t item, int device) {
  (void)device, (void)item;
  int64_t bytes = 0;
  TW_RUN(on_gpu, (void)(bytes = prune::activation_sparse_linear_workspace(tokens, in, out, item)),
         (void)(bytes = prune::activation_sparse_linear_workspace_cuda(tokens, in, out, device)));
  return bytes;
}

// One layout for all calls: what the product needs, what is kept, what the choice needs.
struct Layout {
  int64_t keep, choice, bytes;
};

Layout layout_of(const TensorView& x, int64_t out, int threads) {
  const auto rounded = [](int64_t bytes) { return divide_up(bytes, 64) * 64; };
  const int64_t product = product_bytes(runs_on_gpu(x), x.shape[0], x.shape[1], larger(out, 1),
                                        itemsize(x.dtype), x.device.index);
  const int64_t keep = rounded(product), choice = keep + rounded(x.numel());
  return {keep, choice, choice + (runs_on_gpu(x) ? 0 : prune::select_rows_workspace(x.shape[1], threads))};
}

char* read_workspace(Arguments& arguments, py::handle object, const Layout& layout) {
  const TensorView room = arguments.tensor(object, "workspace");
  check_dtype(room, DType::kUInt8, "workspace");
  check_numel(room, layout.bytes, "workspace");
  return static_cast<char*>(room.data);
}

void keep_inputs(py::handle x_object, py::handle scale, py::handle threshold, int64_t count, py::handle keep,
                 py::handle workspace, int threads) {
  Arguments arguments;
  const TensorView x = read_x(arguments, x_object);
  KeepInputsParams p = read_choice(arguments, x, scale, threshold, count);
  p.keep = read_keep(arguments, keep, x, Access::kOverwrite);
  const Layout layout = layout_of(x, 0, threads);
  p.workspace = read_workspace(arguments, workspace, layout) + layout.choice;
  const Stream stream = arguments.current_stream(x.device);
  py::gil_scoped_release released;
  run_choice(p, x, stream, threads);
}

int64_t workspace_bytes(py::handle x_object, int64_t out, int threads) {
  Arguments arguments;
  return layout_of(read_x(arguments, x_object), out, threads).bytes;
}

// All of the product but what is kept, and its workspace.
ActivationSparseLinearParams read_product(Arguments& arguments, const TensorView& x, py::handle weight_object,
                                          py::handle bias, py::handle y) {
  ActivationSparseLinearParams p{};
  p.x = {x.data, x.stride(0), x.stride(1)};
  p.tokens = x.shape[0], p.in = x.shape[1];
  p.dtype = x.dtype;
  check_value(p.tokens <= prune::kMaxActiveTokens, "x: at most ", prune::kMaxActiveTokens, " tokens, got ",
              p.tokens);
  const TensorView weight = arguments.tensor(weight_object, "weight_t");
  check_device(weight, x.device, "weight_t");
  check_dtype(weight, x.dtype, "weight_t");
  check_value(weight.ndim == 2 && weight.shape[0] == p.in,
              "weight_t: must have shape (in, out) with in = ", p.in, ", got ", weight.sizes());
  check_value(weight.shape[1] <= 1 || weight.stride(1) == 1,
              "weight_t: the weights of an input must lie side by side, got a stride of ", weight.stride(1));
  p.weight = weight.data;
  p.weight_row = weight.stride(0);
  p.out = weight.shape[1];
  p.bias = arguments.flat(bias, "bias", p.out, x.dtype, x.device);
  p.y = arguments.flat(y, "y", p.tokens * p.out, x.dtype, x.device);
  return p;
}

void run_product(const ActivationSparseLinearParams& p, const TensorView& x, Stream stream, int threads) {
  (void)stream, (void)threads;
  if (p.tokens * p.out == 0) return;
  TW_RUN(x.device.is_cuda, TW_CALL_CPU(activation_sparse_linear_cpu, p, threads),
         prune::activation_sparse_linear_cuda(p, x.device.index, stream));
}

void linear(py::handle x_object, py::handle keep, py::handle weight, py::handle bias, py::handle y,
            py::handle workspace, int threads) {
  Arguments arguments;
  const TensorView x = read_x(arguments, x_object);
  const uint8_t* kept = read_keep(arguments, keep, x, Access::kRead);
  ActivationSparseLinearParams p = read_product(arguments, x, weight, bias, y);
  p.keep = kept;
  p.workspace = read_workspace(arguments, workspace, layout_of(x, p.out, threads));
  const Stream stream = arguments.current_stream(x.device);
  py::gil_scoped_release released;
  run_product(p, x, stream, threads);
}

// Both.
void step(py::handle x_object, py::handle scale, py::handle threshold, int64_t count, py::handle weight,
          py::handle bias, py::handle y, py::handle workspace, int threads) {
  Arguments arguments;
  const TensorView x = read_x(arguments, x_object);
  KeepInputsParams choice = read_choice(arguments, x, scale, threshold, count);
  ActivationSparseLinearParams product = read_product(arguments, x, weight, bias, y);
  const Layout layout = layout_of(x, product.out, threads);
  char* room = read_workspace(arguments, workspace, layout);
  product.workspace = room, choice.workspace = room + layout.choice;
  choice.keep = reinterpret_cast<uint8_t*>(room + layout.keep), product.keep = choice.keep;
  const Stream stream = arguments.current_stream(x.device);
  py::gil_scoped_release released;
  run_choice(choice, x, stream, threads);
  run_product(product, x, stream, threads);
}

}  // namespace

void bind_activation_sparse(py::module_& m) {
  m.def("activation_sparse_workspace", &workspace_bytes,
        "Bytes of workspace for so many outputs; keep_inputs has none.");
  m.def("keep_inputs", &keep_inputs, "Writes which inputs each token keeps.");
  m.def("activation_sparse_linear", &linear, "Writes y of the inputs that are kept.");
  m.def("activation_sparse_step", &step, "Writes y of the inputs that each token keeps.");
}

}  // namespace tilewright
