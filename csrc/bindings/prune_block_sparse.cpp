// The block-sparse linear layer and its gradient.
#include <cstdlib>
#include <memory>
#include <new>

#include "bindings/arguments.h"
#include "bindings/families.h"
#include "core/dispatch.h"
#include "core/integers.h"
#include "prune/block_sparse_linear.h"

namespace tilewright {
namespace {

using prune::Activation;
using prune::BlockPattern;
using prune::BlockSparseCall;
using prune::BlockSparseLinearParams;
using prune::Matrix;

// Reads the arguments of one call. Sizes come from the values and from the matrices, which have to agree.
class LayerReader {
 public:
  LayerReader(py::handle values, int64_t out, int64_t in) : values_(arguments.tensor(values, "values")) {
    check_value(values_.ndim == 3, "values: must have shape (blocks, block rows, block columns), got ",
                values_.sizes());
    check_contiguous(values_, "values");
    check_real(values_, "values");
    for (int32_t axis = 1; axis <= 2; ++axis) {
      const int64_t size = values_.shape[axis];
      check_value(size >= 8 && size <= 128 && (size & (size - 1)) == 0, "values: ", size,
                  axis == 1 ? " rows" : " columns", " a block, allowed: 8, 16, 32, 64, 128");
    }
    p.tokens = -1;  // as the first matrix says
    p.values = values_.data;
    p.dtype = values_.dtype;
    p.out = out, p.in = in;
    p.pattern.block_rows = int32_t(values_.shape[1]);
    p.pattern.block_columns = int32_t(values_.shape[2]);
  }

  void read_pattern(py::handle object) {
    BlockPattern& to = p.pattern;
    to.blocks = values_.shape[0];
    to.rows = divide_up(p.out, to.block_rows);
    to.columns = divide_up(p.in, to.block_columns);
    const int64_t size = prune::pattern_size(to.rows, to.columns, to.blocks);
    const auto* at =
        static_cast<const int32_t*>(arguments.flat(object, "pattern", size, DType::kInt32, values_.device));
    const auto take = [&](int64_t count) {
      at += count;
      return at - count;
    };
    to.first = take(to.rows + 1);
    to.column = take(to.blocks);
    to.row = take(to.blocks);
    to.order = take(to.rows);
    to.t_first = take(to.columns + 1);
    to.t_row = take(to.blocks);
    to.t_block = take(to.blocks);
    to.t_order = take(to.columns);
  }

  // A matrix (..., width) of the values' dtype, whose leading axes are those of the tokens.
  Matrix matrix(py::handle object, const char* name, int64_t width, Access access = Access::kRead) {
    const TensorView v = arguments.tensor(object, name, access);
    check_device(v, values_.device, name);
    check_dtype(v, p.dtype, name);
    const int32_t last = v.ndim - 1;
    check_value(last >= 1 && v.shape[last] == width, name, ": must have shape (tokens, ", width, "), got ",
                v.sizes());
    const std::optional<int64_t> step = row_stride(v);  // from one token to the next
    check_value(step.has_value(), name, ": tokens must lie at even distances");
    int64_t tokens = 1;
    for (int32_t axis = 0; axis < last; ++axis) tokens *= v.shape[axis];
    check_value(p.tokens < 0 || tokens == p.tokens, name, ": holds ", tokens, " tokens, not ", p.tokens);
    p.tokens = tokens;
    return {v.data, *step, v.stride(last)};
  }

  const void* bias(py::handle object) {
    return arguments.flat(object, "bias", p.out, p.dtype, values_.device);
  }

  // Scratch of a CPU's kernel is found here where the caller brings none.
  void run(BlockSparseCall call, py::handle workspace, int threads) {
    Scratch scratch{nullptr, std::free};
    if (!workspace.is_none()) {
      p.workspace = arguments.tensor(workspace, "workspace").data;
    } else if (const int64_t bytes = workspace_bytes(call, threads); bytes > 0) {
      scratch.reset(std::aligned_alloc(64, size_t(divide_up(bytes, 64) * 64)));
      if (scratch == nullptr) throw std::bad_alloc();
      p.workspace = scratch.get();
    }
    const Device device = values_.device;
    const Stream stream = arguments.current_stream(device);
    py::gil_scoped_release released;
    (void)threads;
    (void)stream;
    TW_RUN(device.is_cuda, TW_CALL_CPU(block_sparse_linear_cpu, p, call, threads),
           prune::block_sparse_linear_cuda(p, call, device.index, stream));
  }

  int64_t workspace_bytes(BlockSparseCall call, int threads) {
    p.pattern.rows = divide_up(p.out, p.pattern.block_rows);
    p.pattern.columns = divide_up(p.in, p.pattern.block_columns);
    int64_t bytes = 0;
    (void)call;
    (void)threads;
    TW_RUN(values_.device.is_cuda,
           void(bytes = TW_CALL_CPU(block_sparse_linear_workspace_cpu, p, call, threads)), void());
    return bytes;
  }

  Arguments arguments;
  BlockSparseLinearParams p{};

 private:
  using Scratch = std::unique_ptr<void, decltype(&std::free)>;

  TensorView values_;
};

void forward(py::handle x, py::handle values, py::handle pattern, py::handle bias, py::handle y, py::handle z,
             int64_t out, int64_t in, int activation, py::handle workspace, int threads) {
  LayerReader reader(values, out, in);
  BlockSparseLinearParams& p = reader.p;
  reader.read_pattern(pattern);
  p.x = reader.matrix(x, "x", in);
  p.y = reader.matrix(y, "y", out, Access::kOverwrite);
  if (!z.is_none()) p.z = reader.matrix(z, "z", out, Access::kOverwrite);
  p.bias = reader.bias(bias);
  p.activation = Activation(activation);
  reader.run(BlockSparseCall::kForward, workspace, threads);
}

void input_gradient(py::handle dz, py::handle values, py::handle pattern, py::handle dx, int64_t out,
                    int64_t in, py::handle workspace, int threads) {
  LayerReader reader(values, out, in);
  reader.read_pattern(pattern);
  reader.p.y = reader.matrix(dz, "dz", out);
  reader.p.dx = reader.matrix(dx, "dx", in, Access::kOverwrite);
  reader.run(BlockSparseCall::kInput, workspace, threads);
}

void weight_gradient(py::handle dz, py::handle x, py::handle pattern, py::handle dvalues, int64_t out,
                     int64_t in, py::handle workspace, int threads) {
  LayerReader reader(dvalues, out, in);
  reader.read_pattern(pattern);
  reader.p.y = reader.matrix(dz, "dz", out);
  reader.p.x = reader.matrix(x, "x", in);
  reader.run(BlockSparseCall::kWeight, workspace, threads);
}

// Bytes of scratch that a call needs.
int64_t workspace_bytes(py::handle values, int64_t out, int64_t in, int64_t tokens, int call, int threads) {
  LayerReader reader(values, out, in);
  reader.p.tokens = tokens;
  return reader.workspace_bytes(BlockSparseCall(call), threads);
}

}  // namespace

void bind_block_sparse_linear(py::module_& m) {
  m.def("block_sparse_linear_fwd", &forward, "Writes y = activation(x W^T + bias), and z before it.");
  m.def("block_sparse_linear_dx", &input_gradient, "Writes dx = dz W.");
  m.def("block_sparse_linear_dw", &weight_gradient, "Writes dW = dz^T x at the blocks that are there.");
  m.def("block_sparse_linear_workspace", &workspace_bytes, "Bytes of scratch a call needs.");
}

}  // namespace tilewright
