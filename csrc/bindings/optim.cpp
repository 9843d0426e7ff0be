// Blockwise quantization and the optimizer step.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>

#include "bindings/arguments.h"
#include "bindings/families.h"
#include "core/dispatch.h"
#include "optim/codec.h"
#include "optim/quantize.h"
#include "optim/update.h"

namespace tilewright {
namespace {

using optim::Algorithm;

constexpr int64_t kMapEntries = 256;

// Device tensors that hold a built-in map. Their content cannot be looked at without waiting for the device,
// so Python says once which they are and keeps them alive.
std::vector<std::pair<const void*, bool>>& registered_maps() {
  static std::vector<std::pair<const void*, bool>> maps;
  return maps;
}

// Null if the map is the built-in one, else its entries.
const float* foreign_map(const TensorView& map, bool is_signed) {
  if (map.device.is_cuda) {
    for (const auto& [data, of_signed] : registered_maps()) {
      if (data == map.data && of_signed == is_signed) return nullptr;
    }
    return static_cast<const float*>(map.data);
  }
  const float* builtin = (is_signed ? optim::kSignedCodebook : optim::kUnsignedCodebook).decode;
  return std::memcmp(map.data, builtin, sizeof optim::kSignedCodebook.decode) == 0
             ? nullptr
             : static_cast<const float*>(map.data);
}

const float* read_map(const TensorView& map, bool is_signed, Device device, Label name) {
  check_dtype(map, DType::kFloat32, name);
  check_numel(map, kMapEntries, name);
  check_contiguous(map, name);
  check_device(map, device, name);
  return foreign_map(map, is_signed);
}

bool is_parameter_dtype(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

optim::QuantizeParams quantize_params(Arguments& arguments, py::handle values, const char* values_name,
                                      py::handle codes, const char* codes_name, py::handle absmax,
                                      py::handle map, bool is_signed, int64_t blocksize, Device& device) {
  const auto read = [&](py::handle object, const char* name) {
    const bool written = std::strcmp(name, "out") == 0;
    return arguments.tensor(object, name, written ? Access::kOverwrite : Access::kRead);
  };
  const TensorView v = read(values, values_name), c = read(codes, codes_name);
  const TensorView a = arguments.tensor(absmax, "absmax");
  device = v.device;
  check_type(is_parameter_dtype(v.dtype), values_name, ": got dtype ", v.dtype,
             ", allowed: float32, float16, bfloat16");
  check_value(blocksize >= 64 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0, "blocksize: got ",
              blocksize, ", allowed: 64, 128, 256, 512, 1024, 2048, 4096");
  check_dtype(c, DType::kUInt8, codes_name);
  check_dtype(a, DType::kFloat32, "absmax");
  check_contiguous(v, values_name);
  check_contiguous(c, codes_name);
  check_contiguous(a, "absmax");
  check_device(c, device, codes_name);
  check_device(a, device, "absmax");
  const int64_t numel = v.numel();
  check_numel(c, numel, codes_name);
  check_numel(a, (numel + blocksize - 1) / blocksize, "absmax");
  optim::QuantizeParams p{};
  p.values = v.data;
  p.codes = static_cast<uint8_t*>(c.data);
  p.absmax = static_cast<float*>(a.data);
  if (!map.is_none()) p.map = read_map(arguments.tensor(map, "code"), is_signed, device, "code");
  p.numel = numel;
  p.block_size = int32_t(blocksize);
  p.dtype = v.dtype;
  p.is_signed = is_signed;
  return p;
}

void quantize(py::handle values, py::handle map, bool is_signed, py::handle codes, py::handle absmax,
              int64_t blocksize, int threads) {
  Arguments arguments;
  Device device;
  const auto p =
      quantize_params(arguments, values, "A", codes, "out", absmax, map, is_signed, blocksize, device);
  const Stream stream = arguments.current_stream(device);
  py::gil_scoped_release released;
  (void)threads;
  (void)stream;
  TW_RUN(device.is_cuda, TW_CALL_CPU(quantize_cpu, p, threads),
         optim::quantize_cuda(p, device.index, stream));
}

void dequantize(py::handle codes, py::handle absmax, py::handle map, bool is_signed, py::handle values,
                int64_t blocksize, int threads) {
  Arguments arguments;
  Device device;
  const auto p =
      quantize_params(arguments, values, "out", codes, "A", absmax, map, is_signed, blocksize, device);
  const Stream stream = arguments.current_stream(device);
  py::gil_scoped_release released;
  (void)threads;
  (void)stream;
  TW_RUN(device.is_cuda, TW_CALL_CPU(dequantize_cpu, p, threads),
         optim::dequantize_cuda(p, device.index, stream));
}

// One optimizer's tensors on one device. bind() reads and checks everything anew each step, so nothing can go
// stale when a caller replaces a gradient, a parameter's memory or a state; only what was uploaded is
// remembered.
class OptimizerPlan {
 public:
  explicit OptimizerPlan(const std::string& kind) {
    if (kind == "adam") {
      algorithm_ = Algorithm::kAdam;
    } else if (kind == "lion") {
      algorithm_ = Algorithm::kLion;
    } else {
      check_value(kind == "sgd", "kind: got '", kind, "', allowed: adam, lion, sgd");
      algorithm_ = Algorithm::kSgd;
    }
  }

  int64_t bind(const py::list& params, const py::list& grads, const py::list& states, const py::list& groups,
               const py::list& ids) {
    const size_t count = params.size();
    check_value(
        grads.size() == count && states.size() == count && groups.size() == count && ids.size() == count,
        "params, grads, states, groups and ids must be equally long");
    Arguments arguments;
    rows_.clear();
    grads_.clear();
    num_tiles_ = 0;
    largest_group_ = -1;
    for (size_t i = 0; i < count; ++i) {
      const int64_t id = PyLong_AsLongLong(PyList_GET_ITEM(ids.ptr(), Py_ssize_t(i)));
      const int64_t group = PyLong_AsLongLong(PyList_GET_ITEM(groups.ptr(), Py_ssize_t(i)));
      if (PyErr_Occurred()) throw py::error_already_set();
      add_row(arguments, PyList_GET_ITEM(params.ptr(), Py_ssize_t(i)),
              PyList_GET_ITEM(grads.ptr(), Py_ssize_t(i)), PyList_GET_ITEM(states.ptr(), Py_ssize_t(i)),
              group, id, i == 0);
    }
    stream_ = count == 0 ? nullptr : arguments.current_stream(device_);
    return on_gpu_ && count != 0 ? optim::workspace_bytes(int64_t(count)) : 0;
  }

  // `captured`: the step is recorded into a CUDA graph, with a workspace of its own that holds nothing yet.
  void step(const py::list& groups, py::handle workspace, bool captured, py::handle grad_scale,
            py::handle found_inf, std::optional<double> max_grad_norm, uint64_t seed, int threads) {
    if (rows_.empty()) return;
    Arguments arguments;
    std::vector<optim::Group> read;
    for (py::handle group : groups) read.push_back(read_group(arguments, group));
    check_value(largest_group_ < int64_t(read.size()), "groups: got ", read.size(),
                " entries, a parameter names group ", largest_group_);
    optim::StepParams params{};
    params.grad_scale = read_scalar(arguments, grad_scale, "grad_scale");
    params.found_inf = read_scalar(arguments, found_inf, "found_inf");
    params.max_grad_norm = max_grad_norm.value_or(-1.0);
    params.seed = seed;
    coefficients_.resize(rows_.size());
    const optim::UpdateParams update{rows_.data(), grads_.data(),        int64_t(rows_.size()),
                                     num_tiles_,   coefficients_.data(), algorithm_};
    void* device_memory = nullptr;
    bool upload = false;
    if (on_gpu_) {
      const TensorView memory = arguments.tensor(workspace, "workspace");
      check_value(memory.numel() >= optim::workspace_bytes(int64_t(rows_.size())), "workspace: too small");
      device_memory = memory.data;
      upload = captured || uploaded_to_ != device_memory || uploaded_.size() != rows_.size() ||
               std::memcmp(uploaded_.data(), rows_.data(), rows_.size() * sizeof(optim::Row)) != 0;
    }
    {
      py::gil_scoped_release released;
      (void)threads;
      TW_RUN(on_gpu_, optim::step_cpu(update, read.data(), params, threads),
             optim::step_cuda(update, read.data(), int64_t(read.size()), params, device_memory, upload,
                              device_.index, stream_));
    }
    if (upload && !captured) {
      uploaded_ = rows_;
      uploaded_to_ = device_memory;
    }
  }

 private:
  static PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

  static py::handle entry(py::handle state, PyObject* key) {
    return PyDict_GetItemWithError(state.ptr(), key);
  }

  void add_row(Arguments& arguments, py::handle param, py::handle grad, py::handle state, int64_t group,
               int64_t id, bool first) {
    const TensorView p = arguments.tensor(param, Label("param", id, "the parameter"));
    const TensorView g = arguments.tensor(grad, Label("param", id, "grad"));
    check_type(is_parameter_dtype(p.dtype), "param ", id, ": got dtype ", p.dtype,
               ", allowed: float32, float16, bfloat16");
    if (first) {
      device_ = p.device;
      on_gpu_ = runs_on_gpu(p);
    }
    check_device(p, device_, Label("param", id, "the parameter"));
    check_device(g, device_, Label("param", id, "grad"));
    check_type(g.dtype == p.dtype, "param ", id, ": grad has dtype ", g.dtype, ", expected the parameter's ",
               p.dtype);
    check_value(g.same_shape(p), "param ", id, ": grad has shape ", g.sizes(), ", expected the parameter's ",
                p.sizes());
    check_value(p.is_dense(), "param ", id, ": its elements of shape ", p.sizes(),
                " do not fill one stretch of memory; make it contiguous");
    check_value(g.same_layout(p), "param ", id, ": grad's strides differ from the parameter's");
    check_type(PyDict_Check(state.ptr()), "param ", id, ": state is not a dict");
    check_value(group >= 0, "param ", id, ": got group ", group, ", allowed: 0 and up");
    largest_group_ = std::max(largest_group_, group);
    optim::Row row{};
    row.param = p.data;
    row.numel = p.numel();
    row.dtype = p.dtype;
    row.group = int32_t(group);
    row.id = int32_t(id);
    row.first_tile = num_tiles_;
    static PyObject* const step_key = interned("step");
    const TensorView step = state_tensor(arguments, state, step_key, id, "state 'step'");
    check_dtype(step, DType::kInt64, Label("param", id, "state 'step'"));
    check_numel(step, 1, Label("param", id, "state 'step'"));
    row.step = static_cast<int64_t*>(step.data);
    add_states(arguments, row, p, state, id);
    const int64_t tiles = (row.numel + row.block_size - 1) / row.block_size;
    check_value(tiles < int64_t{1} << 31, "param ", id, ": has ", row.numel, " elements, too many");
    row.num_tiles = uint32_t(tiles);
    num_tiles_ += tiles;
    rows_.push_back(row);
    grads_.push_back(g.data);
  }

  void add_states(Arguments& arguments, optim::Row& row, const TensorView& p, py::handle state, int64_t id) {
    static PyObject* const state_keys[2] = {interned("state1"), interned("state2")};
    static PyObject* const absmax_keys[2] = {interned("absmax1"), interned("absmax2")};
    static PyObject* const map_keys[2] = {interned("qmap1"), interned("qmap2")};
    static const char* const state_names[2] = {"state 'state1'", "state 'state2'"};
    static const char* const absmax_names[2] = {"state 'absmax1'", "state 'absmax2'"};
    static const char* const map_names[2] = {"state 'qmap1'", "state 'qmap2'"};
    void** const values[2] = {&row.state1, &row.state2};
    float** const scales[2] = {&row.absmax1, &row.absmax2};
    const float** const maps[2] = {&row.map1, &row.map2};
    row.block_size = optim::kPlainTile;
    const int count = algorithm_ == Algorithm::kAdam ? 2 : 1;
    const bool coded = entry(state, absmax_keys[0]).ptr() != nullptr;
    for (int i = 0; i < count; ++i) {
      const TensorView s = state_tensor(arguments, state, state_keys[i], id, state_names[i]);
      check_dtype(s, coded ? DType::kUInt8 : DType::kFloat32, Label("param", id, state_names[i]));
      check_value(s.same_layout(p), "param ", id, ": ", state_names[i], " has shape ", s.sizes(),
                  " or strides that differ from the parameter's ", p.sizes());
      *values[i] = s.data;
      if (!coded) continue;
      const TensorView scale = state_tensor(arguments, state, absmax_keys[i], id, absmax_names[i]);
      check_dtype(scale, DType::kFloat32, Label("param", id, absmax_names[i]));
      check_contiguous(scale, Label("param", id, absmax_names[i]));
      const int32_t block_size = block_size_of(row.numel, scale.numel());
      check_value(block_size != 0 && (i == 0 || block_size == row.block_size), "param ", id, ": ",
                  absmax_names[i], " has ", scale.numel(),
                  " entries, which fits no block size of 256 to 4096 for ", row.numel, " elements");
      row.block_size = block_size;
      *scales[i] = static_cast<float*>(scale.data);
      if (py::handle map = entry(state, map_keys[i]); map.ptr() != nullptr) {
        const Label name("param", id, map_names[i]);
        *maps[i] = read_map(arguments.tensor(map, name), i == 0, device_, name);
      }
    }
    row.general =
        coded && (row.block_size != optim::kUsualBlock || row.map1 != nullptr || row.map2 != nullptr);
  }

  TensorView state_tensor(Arguments& arguments, py::handle state, PyObject* key, int64_t id,
                          const char* name) {
    const py::handle found = entry(state, key);
    check_value(found.ptr() != nullptr, "param ", id, ": ", name, " is missing");
    const TensorView view = arguments.tensor(found, Label("param", id, name));
    check_device(view, device_, Label("param", id, name));
    return view;
  }

  // bitsandbytes' checkpoints do not say their block size; the number of scales does.
  static int32_t block_size_of(int64_t numel, int64_t scales) {
    for (int32_t size = 256; size <= 4096; size *= 2) {
      if ((numel + size - 1) / size == scales) return size;
    }
    return 0;
  }

  const float* read_scalar(Arguments& arguments, py::handle object, const char* name) {
    const auto view = arguments.optional_tensor(object, name);
    if (!view) return nullptr;
    check_dtype(*view, DType::kFloat32, name);
    check_numel(*view, 1, name);
    check_device(*view, device_, name);
    return static_cast<const float*>(view->data);
  }

  optim::Group read_group(Arguments& arguments, py::handle group) {
    optim::Group g{};
    py::object lr = group["lr"];
    if (PyFloat_Check(lr.ptr()) || PyLong_Check(lr.ptr())) {
      g.lr = lr.cast<double>();
    } else {
      g.device_lr = read_scalar(arguments, lr, "lr");
    }
    g.beta1 = group["beta1"].cast<double>();
    g.beta2 = group["beta2"].cast<double>();
    g.eps = group["eps"].cast<double>();
    g.weight_decay = group["weight_decay"].cast<double>();
    g.dampening = group["dampening"].cast<double>();
    g.decoupled = group["decoupled"].cast<bool>();
    g.nesterov = group["nesterov"].cast<bool>();
    g.maximize = group["maximize"].cast<bool>();
    g.stochastic = group["stochastic"].cast<bool>();
    return g;
  }

  Algorithm algorithm_;
  Device device_;
  bool on_gpu_ = false;
  Stream stream_ = nullptr;
  int64_t num_tiles_ = 0;
  int64_t largest_group_ = -1;
  std::vector<optim::Row> rows_;
  std::vector<const void*> grads_;
  std::vector<optim::Coefficients> coefficients_;
  std::vector<optim::Row> uploaded_;
  void* uploaded_to_ = nullptr;
};

std::vector<float> dynamic_map(bool is_signed) {
  const float* entries = (is_signed ? optim::kSignedCodebook : optim::kUnsignedCodebook).decode;
  return {entries, entries + kMapEntries};
}

void register_builtin_map(py::handle map, bool is_signed) {
  Arguments arguments;
  const TensorView view = arguments.tensor(map, "qmap");
  check_dtype(view, DType::kFloat32, "qmap");
  check_numel(view, kMapEntries, "qmap");
  registered_maps().emplace_back(view.data, is_signed);
}

}  // namespace

void bind_optim(py::module_& m) {
  m.def("dynamic_map", &dynamic_map, py::arg("signed"), "The built-in map's 256 entries, ascending.");
  m.def("register_builtin_map", &register_builtin_map, py::arg("qmap"), py::arg("signed"),
        "Declares that this device tensor holds the built-in map.");
  m.def("quantize_blockwise", &quantize, py::arg("A"), py::arg("code").none(true), py::arg("signed"),
        py::arg("out"), py::arg("absmax"), py::arg("blocksize"), py::arg("threads"));
  m.def("dequantize_blockwise", &dequantize, py::arg("A"), py::arg("absmax"), py::arg("code").none(true),
        py::arg("signed"), py::arg("out"), py::arg("blocksize"), py::arg("threads"));
  py::class_<OptimizerPlan>(m, "OptimizerPlan")
      .def(py::init<const std::string&>(), py::arg("kind"))
      .def("bind", &OptimizerPlan::bind, py::arg("params"), py::arg("grads"), py::arg("states"),
           py::arg("groups"), py::arg("ids"))
      .def("step", &OptimizerPlan::step, py::arg("groups"), py::arg("workspace").none(true),
           py::arg("captured"), py::arg("grad_scale").none(true), py::arg("found_inf").none(true),
           py::arg("max_grad_norm").none(true), py::arg("seed"), py::arg("threads"));
}

}  // namespace tilewright
