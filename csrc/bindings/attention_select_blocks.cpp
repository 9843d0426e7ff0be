// The choice of blocks, and bit tables by position.
#include "attention/select_blocks.h"

#include "bindings/arguments.h"
#include "bindings/families.h"
#include "core/dispatch.h"

namespace tilewright {
namespace {

using attention::PositionTablesParams;
using attention::SelectBlocksParams;

// A tensor (batch, heads, rows, blocks) that broadcasts to these sizes, and its strides, 0 where it does.
void broadcast(const TensorView& v, const char* name, const int64_t (&sizes)[4], int64_t* (&strides)[4]) {
  bool fits = v.ndim == 4;
  for (int32_t axis = 0; fits && axis < 4; ++axis) {
    fits = v.shape[axis] == sizes[axis] || (axis < 2 && v.shape[axis] == 1);
    *strides[axis] = v.shape[axis] == 1 ? 0 : v.stride(axis);
  }
  check_value(fits, name, ": must broadcast to (batch, heads, query blocks, key blocks) = ", Shape{sizes, 4},
              ", got ", v.sizes());
}

void select_blocks(py::handle scores, py::handle candidates, py::handle codes, int64_t count, double mass,
                   py::handle workspace, int threads) {
  Arguments arguments;
  const TensorView to = arguments.tensor(codes, "codes", Access::kOverwrite);
  check_value(to.ndim == 4, "codes: must have shape (batch, heads, query blocks, key blocks), got ",
              to.sizes());
  check_type(to.dtype == DType::kUInt8 || to.dtype == DType::kInt32, "codes: got dtype ", to.dtype,
             ", allowed: uint8, int32");
  if (to.numel() > 0) check_contiguous(to, "codes");
  SelectBlocksParams p{};
  const int64_t sizes[4] = {to.shape[0], to.shape[1], to.shape[2], to.shape[3]};
  p.batch = sizes[0], p.heads = sizes[1], p.rows = sizes[2], p.blocks = sizes[3];
  p.codes = to.data;
  p.wide = to.dtype == DType::kInt32;
  const TensorView s = arguments.tensor(scores, "scores");
  check_device(s, to.device, "scores");
  check_dtype(s, DType::kFloat32, "scores");
  int64_t* score_strides[4] = {&p.scores_batch, &p.scores_head, &p.scores_row, &p.scores_block};
  broadcast(s, "scores", sizes, score_strides);
  p.scores = static_cast<const float*>(s.data);
  const TensorView c = arguments.tensor(candidates, "candidates");
  check_device(c, to.device, "candidates");
  check_dtype(c, to.dtype, "candidates");
  int64_t* code_strides[4] = {&p.candidates_batch, &p.candidates_head, &p.candidates_row,
                              &p.candidates_block};
  broadcast(c, "candidates", sizes, code_strides);
  p.candidates = c.data;
  p.count = count;
  p.mass = float(mass);
  const TensorView w = arguments.tensor(workspace, "workspace");
  check_dtype(w, DType::kUInt8, "workspace");
  check_numel(w, attention::select_blocks_workspace(p.blocks, threads), "workspace");
  p.workspace = w.data;
  if (to.numel() == 0) return;
  const Device device = to.device;
  const Stream stream = arguments.current_stream(device);
  py::gil_scoped_release released;
  (void)stream;
  TW_RUN(device.is_cuda, TW_CALL_CPU(select_blocks_cpu, p, threads),
         attention::select_blocks_cuda(p, device.index, stream));
}

const TensorView int32(Arguments& arguments, py::handle object, const char* name, int32_t ndim,
                       Device device) {
  const TensorView v = arguments.tensor(object, name);
  check_device(v, device, name);
  check_dtype(v, DType::kInt32, name);
  check_value(v.ndim == ndim, name, ": must have ", ndim, " axes, got ", v.sizes());
  if (v.numel() > 0) check_contiguous(v, name);
  return v;
}

void position_tables(py::handle positions, py::handle pairs, py::handle tables, int64_t q_len, int block_kv,
                     int threads) {
  Arguments arguments;
  const Device device = arguments.tensor(positions, "positions").device;
  const TensorView of = int32(arguments, positions, "positions", 3, device);
  const TensorView which = int32(arguments, pairs, "pairs", 2, device);
  const TensorView to = int32(arguments, tables, "tables", 3, device);
  PositionTablesParams p{};
  p.positions = static_cast<const int32_t*>(of.data);
  p.pairs = static_cast<const int32_t*>(which.data);
  p.tables = static_cast<uint32_t*>(to.data);
  p.all_heads = of.shape[0] * of.shape[1];
  p.kv_len = of.shape[2];
  p.q_len = q_len;
  p.pair_count = which.shape[0];
  p.block_q = int32_t(to.shape[1]);
  p.block_kv = block_kv;
  check_value(
      which.shape[1] == 2 && to.shape[0] == p.all_heads * p.pair_count && to.shape[2] == (block_kv + 31) / 32,
      "tables: must have shape (batch * heads * pairs, block_q, words), got ", to.sizes());
  if (to.numel() == 0) return;
  const Stream stream = arguments.current_stream(device);
  py::gil_scoped_release released;
  (void)threads;
  (void)stream;
  TW_RUN(device.is_cuda, TW_CALL_CPU(position_tables_cpu, p, threads),
         attention::position_tables_cuda(p, device.index, stream));
}

}  // namespace

void bind_select_blocks(py::module_& m) {
  m.def("select_blocks", &select_blocks, "Writes the codes of each row's best candidates.");
  m.def("position_tables", &position_tables, "Writes the bit tables of blocks whose keys are in any order.");
}

}  // namespace tilewright
