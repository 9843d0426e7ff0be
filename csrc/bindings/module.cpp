// The extension module. Nothing here, and nothing at import, touches CUDA: a process may fork afterwards.
#include <dlfcn.h>
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/families.h"
#include "core/check.h"
#include "core/cpu_level.h"

#if TILEWRIGHT_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace tilewright {
namespace {

void translate_errors(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const Error& error) {
    PyObject* type = PyExc_RuntimeError;
    if (error.kind() == ErrorKind::kValue) type = PyExc_ValueError;
    if (error.kind() == ErrorKind::kType) type = PyExc_TypeError;
    if (error.kind() == ErrorKind::kNotImplemented) type = PyExc_NotImplementedError;
    PyErr_SetString(type, error.what());
  }
}

py::dict build_info() {
  py::dict info;
  info["version"] = TILEWRIGHT_VERSION;
#if TILEWRIGHT_CUDA
  info["cuda"] = true;
  info["cuda_archs"] = TILEWRIGHT_CUDA_ARCHS;
  info["cudart"] = CUDART_VERSION;
#else
  info["cuda"] = false;
  info["cuda_archs"] = "";
  info["cudart"] = py::none();
#endif
#if TILEWRIGHT_EMULATED
  info["emulated"] = true;
#else
  info["emulated"] = false;
#endif
  info["compiler"] = __VERSION__;
  py::list levels;
#if defined(__x86_64__)
  for (const char* level : {"baseline", "avx2", "avx512", "avx512_bf16"}) levels.append(level);
#else
  levels.append("baseline");
#endif
  info["cpu_levels"] = levels;
  py::list families;
#if TILEWRIGHT_HAS_ATTENTION
  families.append("attention");
#endif
#if TILEWRIGHT_HAS_OPTIM
  families.append("optim");
#endif
#if TILEWRIGHT_HAS_PRUNE
  families.append("prune");
#endif
#if TILEWRIGHT_HAS_SCAN
  families.append("scan");
#endif
  info["families"] = families;
  return info;
}

py::dict cuda_runtime() {
  py::dict result;
  int driver = 0, runtime = 0, devices = 0;
  py::object error = py::none();
#if TILEWRIGHT_CUDA
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status != cudaSuccess) {
    cudaGetLastError();
    devices = 0;
    error = py::str(cudaGetErrorString(status));
  }
#else
  error = py::str("this build holds no CUDA kernels");
#endif
  result["driver"] = driver;
  result["runtime"] = runtime;
  result["devices"] = devices;
  result["error"] = error;
  return result;
}

// A fork copies none of the threads that OpenMP keeps for its next region: the child would wait for them
// forever. They end before the fork instead, and start again when they are needed. Looked up by name, since
// runtimes older than OpenMP 5.0 do not have it.
void end_idle_threads() {
  static const auto pause = reinterpret_cast<int (*)(int)>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));
  constexpr int kSoft = 1;
  if (pause != nullptr) pause(kSoft);
}

void bind_cpu_levels(py::module_& m) {
  m.def("cpu_level", [] { return std::string(name_of(cpu_level())); }, "The CPU level in use.");
  m.def("set_cpu_level", &set_cpu_level, py::arg("level"), "Chooses the CPU level, for tests.");
  m.def(
      "cpu_levels",
      [] {
        std::vector<std::string> names;
        for (CpuLevel level : usable_cpu_levels()) names.emplace_back(name_of(level));
        return names;
      },
      "CPU levels that this machine can run, lowest first.");
}

}  // namespace
}  // namespace tilewright

PYBIND11_MODULE(TILEWRIGHT_MODULE_NAME, m) {
  m.doc() = "Compiled kernels of tilewright. Use the Python functions; they check and explain.";
  py::register_exception_translator(&tilewright::translate_errors);
  pthread_atfork(&tilewright::end_idle_threads, nullptr, nullptr);
  m.def("build_info", &tilewright::build_info);
  m.def("cuda_runtime", &tilewright::cuda_runtime, "Driver and runtime versions; never raises.");
  tilewright::bind_cpu_levels(m);
#if TILEWRIGHT_HAS_ATTENTION
  tilewright::bind_attention(m);
#endif
#if TILEWRIGHT_HAS_OPTIM
  tilewright::bind_optim(m);
#endif
#if TILEWRIGHT_HAS_PRUNE
  tilewright::bind_prune(m);
#endif
#if TILEWRIGHT_HAS_SCAN
  tilewright::bind_scan(m);
#endif
#if TILEWRIGHT_EMULATED
  tilewright::emulator::bind_selftest(m);
#endif
}
