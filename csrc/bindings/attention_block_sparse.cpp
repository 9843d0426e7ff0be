// Block-sparse attention.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention/block_sparse.h"
#include "attention/block_sparse_sm90.h"
#include "bindings/arguments.h"
#include "bindings/families.h"
#include "core/dispatch.h"

namespace tilewright {
namespace {

using attention::BlockLists;
using attention::BlockSparseParams;
using attention::HeadsTensor;

// The names of a list's tensors.
struct ListNames {
  const char *counts, *indices, *bits;
};

constexpr ListNames kQ2K = {"q2k_counts", "q2k_indices", "q2k_bits"};
constexpr ListNames kK2Q = {"k2q_counts", "k2q_indices", "k2q_bits"};

// Bad numbers in a list are an error where they can be read; on a GPU that would wait for it.
void check_lists(const BlockLists& lists, int64_t all_rows, int64_t blocks, int64_t tables,
                 const ListNames& names) {
  for (int64_t row = 0; row < all_rows; ++row) {
    const int64_t count = lists.counts[row];
    check_value(count >= 0 && count <= lists.capacity, names.counts, ": row ", row, " has ", count,
                " entries, allowed: 0 to ", lists.capacity);
    const int32_t* indices = lists.indices + row * lists.capacity;
    for (int64_t i = 0; i < count; ++i) {
      check_value(indices[i] >= 0 && indices[i] < blocks, names.indices, ": row ", row, " names block ",
                  indices[i], ", but there are ", blocks);
      check_value(i == 0 || indices[i - 1] < indices[i], names.indices, ": row ", row,
                  " must ascend without repeats, got ", indices[i - 1], " before ", indices[i]);
      if (lists.bits == nullptr) continue;
      const int64_t table = lists.bits[row * lists.capacity + i];
      check_value(table >= -1 && table < tables, names.bits, ": row ", row, " names table ", table,
                  ", but there are ", tables);
    }
  }
}

// Reads the arguments of one call and holds them against the sizes that q, k and v give.
class Reader {
 public:
  // checked: whether the numbers in the lists are looked at.
  Reader(BlockSparseParams& params, bool look_at_lists) : p(params), checked(look_at_lists) {}

  void inputs(const py::dict& t, int32_t block_q, int32_t block_kv, double scale, double softcap,
              bool causal) {
    sizes(t["q"], t["k"], t["v"]);
    p.q = tensor(t["q"], "q", p.heads, p.q_len, p.head_dim);
    p.k = tensor(t["k"], "k", p.kv_heads, p.kv_len, p.head_dim);
    p.v = tensor(t["v"], "v", p.kv_heads, p.kv_len, p.value_dim);
    p.scale = scale;
    p.softcap = softcap;
    p.causal = causal;
    check_value(softcap >= 0, "softcap: got ", softcap, ", allowed: 0 (none) and above");
    check_value(block_q > 0 && block_kv > 0, "block_size: got (", block_q, ", ", block_kv,
                "), must be positive");
    p.mask.block_q = block_q;
    p.mask.block_kv = block_kv;
    p.mask.q_len = p.q_len;
    p.mask.kv_len = p.kv_len;
    const int64_t q_blocks = (p.q_len + block_q - 1) / block_q,
                  kv_blocks = (p.kv_len + block_kv - 1) / block_kv;
    const int64_t tables = read_tables(t["tables"]);
    p.mask.q2k = lists(t, kQ2K, q_blocks, kv_blocks, tables);
    p.mask.k2q = lists(t, kK2Q, kv_blocks, q_blocks, tables);
    p.key_from = static_cast<const int32_t*>(flat(t["key_from"], "key_from", p.q_len, DType::kInt32));
    p.key_to = static_cast<const int32_t*>(flat(t["key_to"], "key_to", p.q_len, DType::kInt32));
    check_value((p.key_from == nullptr) == (p.key_to == nullptr), "key_from, key_to: give both or none");
  }

  // (batch, heads, length, dim) of the dtype of q.
  HeadsTensor tensor(py::handle object, Label name, int64_t heads, int64_t length, int64_t dim,
                     Access access = Access::kRead) {
    const TensorView view = arguments.tensor(object, name, access);
    check_dtype(view, p.dtype, name);
    check_device(view, device, name);
    const bool fits = view.ndim == 4 && view.shape[0] == p.batch && view.shape[1] == heads &&
                      view.shape[2] == length && view.shape[3] == dim;
    check_value(fits, name, ": got shape ", view.sizes(), ", expected (", p.batch, ", ", heads, ", ", length,
                ", ", dim, ")");
    return {view.data, view.stride(0), view.stride(1), view.stride(2), view.stride(3)};
  }

  void* flat(py::handle object, Label name, int64_t numel, DType dtype) {
    return arguments.flat(object, name, numel, dtype, device);
  }

  // Scratch of at least the bytes that the kernel asks for.
  void workspace(py::handle object, int64_t bytes) {
    const TensorView view = arguments.tensor(object, "workspace", Access::kOverwrite);
    check_dtype(view, DType::kUInt8, "workspace");
    check_device(view, device, "workspace");
    check_value(view.numel() >= bytes, "workspace: got ", view.numel(), " bytes, expected ", bytes);
    p.workspace = view.data;
  }

  DType statistics() const { return p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
  int64_t rows() const { return p.batch * p.heads * p.q_len; }

  BlockSparseParams& p;
  Arguments arguments;
  Device device;

 private:
  void sizes(py::handle q_object, py::handle k_object, py::handle v_object) {
    const TensorView q = arguments.tensor(q_object, "q"), k = arguments.tensor(k_object, "k"),
                     v = arguments.tensor(v_object, "v");
    for (const auto& [view, name] : {std::pair{&q, "q"}, {&k, "k"}, {&v, "v"}})
      check_value(view->ndim == 4, name, ": got shape ", view->sizes(), ", expected four axes");
    device = q.device;
    on_gpu = runs_on_gpu(q);
    p.dtype = q.dtype;
    check_type(q.dtype == DType::kFloat32 || q.dtype == DType::kFloat16 || q.dtype == DType::kBFloat16 ||
                   q.dtype == DType::kFloat64,
               "q: got dtype ", q.dtype, ", allowed: float32, float16, bfloat16, and float64 on a CPU");
    if (on_gpu && q.dtype == DType::kFloat64) {
      fail(ErrorKind::kNotImplemented, "q: float64 has no CUDA kernel: move the tensors to the CPU");
    }
    p.batch = q.shape[0];
    p.heads = int32_t(q.shape[1]);
    p.kv_heads = int32_t(k.shape[1]);
    p.q_len = q.shape[2];
    p.kv_len = k.shape[2];
    check_value(p.heads > 0 && p.kv_heads > 0 && p.heads % p.kv_heads == 0, "k: got ", p.kv_heads,
                " heads, expected a divisor of the ", p.heads, " heads of q");
    for (const auto& [view, name] : {std::pair{&q, "q"}, {&v, "v"}})
      check_value(view->shape[3] >= 1 && view->shape[3] <= attention::kMaxHeadDim, name, ": got head dim ",
                  view->shape[3], ", allowed: 1 to ", attention::kMaxHeadDim);
    p.head_dim = int32_t(q.shape[3]);
    p.value_dim = int32_t(v.shape[3]);
  }

  int64_t read_tables(py::handle object) {
    if (object.is_none()) return 0;
    const TensorView view = arguments.tensor(object, "tables");
    const int64_t words = (p.mask.block_kv + 31) / 32;
    check_value(view.ndim == 3 && view.shape[1] == p.mask.block_q && view.shape[2] == words,
                "tables: got shape ", view.sizes(), ", expected (tables, ", p.mask.block_q, ", ", words, ")");
    p.mask.tables = static_cast<const uint32_t*>(flat(object, "tables", view.numel(), DType::kInt32));
    p.tables = int32_t(view.shape[0]);
    return p.tables;
  }

  BlockLists lists(const py::dict& t, const ListNames& names, int64_t rows, int64_t blocks, int64_t tables) {
    const TensorView counts = arguments.tensor(t[names.counts], names.counts);
    const TensorView indices = arguments.tensor(t[names.indices], names.indices);
    check_value(counts.ndim == 3 && (counts.shape[0] == 1 || counts.shape[0] == p.batch) &&
                    counts.shape[1] > 0 && p.heads % counts.shape[1] == 0 && counts.shape[2] == rows,
                names.counts, ": got shape ", counts.sizes(), ", expected (1 or ", p.batch, ", a divisor of ",
                p.heads, ", ", rows, ")");
    const int64_t all_rows = counts.numel();
    check_value(indices.ndim == 4 && indices.shape[0] == counts.shape[0] &&
                    indices.shape[1] == counts.shape[1] && indices.shape[2] == rows,
                names.indices, ": got shape ", indices.sizes(), ", expected that of ", names.counts,
                " and the capacity");
    BlockLists found{};
    found.rows = rows;
    found.capacity = indices.shape[3];
    found.counts = static_cast<const int32_t*>(flat(t[names.counts], names.counts, all_rows, DType::kInt32));
    const int64_t entries = all_rows * found.capacity;
    found.indices =
        static_cast<const int32_t*>(flat(t[names.indices], names.indices, entries, DType::kInt32));
    found.bits = static_cast<const int32_t*>(flat(t[names.bits], names.bits, entries, DType::kInt32));
    found.batch_stride = counts.shape[0] == 1 ? 0 : counts.shape[1] * rows;
    found.head_stride = counts.shape[1] == 1 ? 0 : rows;
    found.heads_per_mask_head = p.heads / counts.shape[1];
    if (!on_gpu && checked) check_lists(found, all_rows, blocks, tables, names);
    return found;
  }

  bool on_gpu = false, checked;
};

// Bytes of scratch for a call on these tensors.
int64_t workspace(const py::dict& tensors, int32_t block_q, int32_t block_kv, bool backward, int threads) {
  BlockSparseParams p{};
  Reader reader(p, false);
  reader.inputs(tensors, block_q, block_kv, 1, 0, false);
  (void)threads;
  int64_t bytes = 0;
  if (backward) {
    TW_RUN(reader.device.is_cuda, void(bytes = TW_CALL_CPU(block_sparse_bwd_workspace_cpu, p, threads)),
           void(bytes = attention::block_sparse_bwd_workspace_cuda(p)));
  } else {
    TW_RUN(reader.device.is_cuda, void(bytes = TW_CALL_CPU(block_sparse_fwd_workspace_cpu, p, threads)),
           void(bytes = attention::block_sparse_fwd_workspace_cuda(p, reader.device.index)));
  }
  return bytes;
}

void forward(const py::dict& tensors, int32_t block_q, int32_t block_kv, double scale, double softcap,
             bool causal, int threads) {
  BlockSparseParams p{};
  Reader reader(p, true);
  reader.inputs(tensors, block_q, block_kv, scale, softcap, causal);
  p.out = reader.tensor(tensors["out"], "out", p.heads, p.q_len, p.value_dim, Access::kOverwrite);
  p.lse = reader.flat(tensors["lse"], "lse", reader.rows(), reader.statistics());
  reader.workspace(tensors["workspace"], workspace(tensors, block_q, block_kv, false, threads));
  [[maybe_unused]] const Stream stream = reader.arguments.current_stream(reader.device);
  py::gil_scoped_release released;
  TW_RUN(reader.device.is_cuda, TW_CALL_CPU(block_sparse_fwd_cpu, p, threads),
         attention::block_sparse_fwd_cuda(p, reader.device.index, stream));
}

void backward(const py::dict& tensors, int32_t block_q, int32_t block_kv, double scale, double softcap,
              bool causal, int threads) {
  BlockSparseParams p{};
  Reader reader(p, true);
  reader.inputs(tensors, block_q, block_kv, scale, softcap, causal);
  p.out = reader.tensor(tensors["out"], "out", p.heads, p.q_len, p.value_dim);
  p.lse = reader.flat(tensors["lse"], "lse", reader.rows(), reader.statistics());
  p.dout = reader.tensor(tensors["dout"], "dout", p.heads, p.q_len, p.value_dim);
  p.dlse = reader.flat(tensors["dlse"], "dlse", reader.rows(), reader.statistics());
  p.dq = reader.tensor(tensors["dq"], "dq", p.heads, p.q_len, p.head_dim, Access::kOverwrite);
  p.dk = reader.tensor(tensors["dk"], "dk", p.kv_heads, p.kv_len, p.head_dim, Access::kOverwrite);
  p.dv = reader.tensor(tensors["dv"], "dv", p.kv_heads, p.kv_len, p.value_dim, Access::kOverwrite);
  reader.workspace(tensors["workspace"], workspace(tensors, block_q, block_kv, true, threads));
  [[maybe_unused]] const Stream stream = reader.arguments.current_stream(reader.device);
  py::gil_scoped_release released;
  TW_RUN(reader.device.is_cuda, TW_CALL_CPU(block_sparse_bwd_cpu, p, threads),
         attention::block_sparse_bwd_cuda(p, reader.device.index, stream));
}

// ---- the Hopper kernel by itself, for tests and benchmarks ----

[[noreturn]] [[maybe_unused]] void only_on_hopper() {
  fail(ErrorKind::kNotImplemented, "block_sparse_fwd_sm90 runs on a GPU: move the tensors there");
}

void forward_sm90(const py::dict& tensors, int32_t block_q, int32_t block_kv, double scale, double softcap,
                  bool causal) {
  BlockSparseParams p{};
  Reader reader(p, true);
  reader.inputs(tensors, block_q, block_kv, scale, softcap, causal);
  p.out = reader.tensor(tensors["out"], "out", p.heads, p.q_len, p.value_dim, Access::kOverwrite);
  p.lse = reader.flat(tensors["lse"], "lse", reader.rows(), reader.statistics());
  bool fits = false;
  int64_t bytes = 0;
  TW_RUN(reader.device.is_cuda, only_on_hopper(), void(fits = attention::block_sparse_fwd_sm90_fits(p)));
  check_value(fits,
              "block_sparse_fwd_sm90: takes 16-bit tensors with head dims in multiples of 8 up to 128, rows "
              "of 16-byte aligned elements, and blocks of 64 queries or multiples");
  TW_RUN(reader.device.is_cuda, only_on_hopper(),
         void(bytes = attention::block_sparse_fwd_workspace_sm90(p)));
  reader.workspace(tensors["workspace"], bytes);
  [[maybe_unused]] const Stream stream = reader.arguments.current_stream(reader.device);
  py::gil_scoped_release released;
  TW_RUN(reader.device.is_cuda, only_on_hopper(),
         attention::block_sparse_fwd_sm90(p, reader.device.index, stream));
}

}  // namespace

void bind_block_sparse(py::module_& m) {
  m.def("block_sparse_workspace", &workspace);
  m.def("block_sparse_fwd", &forward);
  m.def("block_sparse_bwd", &backward);
  m.def("block_sparse_fwd_sm90", &forward_sm90);
}

}  // namespace tilewright
