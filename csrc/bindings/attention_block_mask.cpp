// The lists of a block mask.
#include "attention/block_mask.h"
#include "bindings/arguments.h"
#include "bindings/families.h"
#include "core/dispatch.h"

namespace tilewright {
namespace {

using attention::BlockCodesParams;
using attention::BlockListsParams;
using attention::NewLists;

constexpr int64_t kMaxBlocks = int64_t{1} << 31;

TensorView read_int32(Arguments& arguments, py::handle object, const char* name, Device device,
                      Access access = Access::kRead) {
  const TensorView v = arguments.tensor(object, name, access);
  check_device(v, device, name);
  check_dtype(v, DType::kInt32, name);
  if (v.numel() > 0) check_contiguous(v, name);  // what is empty may have any strides
  return v;
}

TensorView read_codes(Arguments& arguments, py::handle object, Access access = Access::kRead) {
  const TensorView v = arguments.tensor(object, "codes", access);
  check_type(v.dtype == DType::kUInt8 || v.dtype == DType::kBool || v.dtype == DType::kInt32,
             "codes: got dtype ", v.dtype, ", allowed: bool, uint8, int32");
  check_value(v.ndim == 4, "codes: must have shape (batch, heads, query blocks, key blocks), got ",
              v.sizes());
  for (int32_t axis : {2, 3}) {
    check_value(v.shape[axis] < kMaxBlocks, "codes: at most 2^31 - 1 blocks an axis, got ", v.sizes());
  }
  return v;
}

// Three tensors, of which the last two may be None.
NewLists read_lists(Arguments& arguments, py::handle counts, py::handle indices, py::handle bits,
                    int64_t lists, Device device) {
  NewLists to{};
  const TensorView c = read_int32(arguments, counts, "counts", device);
  check_numel(c, lists, "counts");
  to.counts = static_cast<int32_t*>(c.data);
  if (indices.is_none()) return to;
  const TensorView i = read_int32(arguments, indices, "indices", device, Access::kOverwrite);
  check_value(i.ndim == 4 && i.shape[0] * i.shape[1] * i.shape[2] == lists,
              "indices: must have shape (batch, heads, ", "rows, capacity), got ", i.sizes());
  to.indices = static_cast<int32_t*>(i.data);
  to.capacity = i.shape[3];
  if (bits.is_none()) return to;
  const TensorView b = read_int32(arguments, bits, "bits", device, Access::kOverwrite);
  check_numel(b, i.numel(), "bits");
  to.bits = static_cast<int32_t*>(b.data);
  return to;
}

void block_lists(py::handle codes, py::handle q_counts, py::handle q_indices, py::handle q_bits,
                 py::handle kv_counts, py::handle kv_indices, py::handle kv_bits, int threads) {
  Arguments arguments;
  const TensorView v = read_codes(arguments, codes);
  const Device device = v.device;
  BlockListsParams p{};
  p.codes = v.data;
  p.wide = v.dtype == DType::kInt32;
  p.batch = v.shape[0], p.heads = v.shape[1], p.q_blocks = v.shape[2], p.kv_blocks = v.shape[3];
  p.batch_stride = v.stride(0), p.head_stride = v.stride(1), p.q_stride = v.stride(2),
  p.kv_stride = v.stride(3);
  const int64_t heads = p.batch * p.heads;
  p.q2k = read_lists(arguments, q_counts, q_indices, q_bits, heads * p.q_blocks, device);
  p.k2q = read_lists(arguments, kv_counts, kv_indices, kv_bits, heads * p.kv_blocks, device);
  if (heads == 0) return;
  const Stream stream = arguments.current_stream(device);
  py::gil_scoped_release released;
  (void)threads;
  (void)stream;
  TW_RUN(device.is_cuda, TW_CALL_CPU(block_lists_cpu, p, threads),
         attention::block_lists_cuda(p, device.index, stream));
}

void block_codes(py::handle counts, py::handle indices, py::handle bits, int64_t tables, py::handle codes,
                 py::handle flags, int threads) {
  Arguments arguments;
  const TensorView v = read_codes(arguments, codes, Access::kOverwrite);
  if (v.numel() > 0) check_contiguous(v, "codes");
  const Device device = v.device;
  BlockCodesParams p{};
  p.codes = v.data;
  p.wide = v.dtype == DType::kInt32;
  p.rows = v.shape[0] * v.shape[1] * v.shape[2];
  p.blocks = v.shape[3];
  check_value(tables >= 0 && tables < (p.wide ? kMaxBlocks - 2 : 254), "tables: ", tables,
              " do not fit into codes of dtype ", v.dtype);
  p.tables = int32_t(tables);
  const TensorView c = read_int32(arguments, counts, "counts", device);
  check_numel(c, p.rows, "counts");
  p.counts = static_cast<const int32_t*>(c.data);
  const TensorView i = read_int32(arguments, indices, "indices", device);
  check_value(i.ndim == 4 && i.shape[0] * i.shape[1] * i.shape[2] == p.rows,
              "indices: must have shape (batch, heads, query blocks, capacity), got ", i.sizes());
  p.indices = static_cast<const int32_t*>(i.data);
  p.capacity = i.shape[3];
  if (!bits.is_none()) {
    const TensorView b = read_int32(arguments, bits, "bits", device);
    check_numel(b, i.numel(), "bits");
    p.bits = static_cast<const int32_t*>(b.data);
  }
  const TensorView f = read_int32(arguments, flags, "flags", device);
  check_numel(f, p.rows, "flags");
  p.flags = static_cast<int32_t*>(f.data);
  if (p.rows == 0) return;
  const Stream stream = arguments.current_stream(device);
  py::gil_scoped_release released;
  (void)threads;
  (void)stream;
  TW_RUN(device.is_cuda, TW_CALL_CPU(block_codes_cpu, p, threads),
         attention::block_codes_cuda(p, device.index, stream));
}

}  // namespace

void bind_block_mask(py::module_& m) {
  m.def("block_lists", &block_lists, "Writes the lists of a map of codes, both ways.");
  m.def("block_codes", &block_codes, "Writes the map of codes of lists, and what is wrong with them.");
}

}  // namespace tilewright
