#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulator/runtime.h"
#include "emulator/sanitizer.h"
#include "emulator/selftest.h"

namespace tilewright::emulator {

namespace py = pybind11;

namespace {

// Kernels run without the GIL, as the real launches do.
template <class Function, class... Arguments>
void define(py::module_& module, const char* name, Function function, const Arguments&... arguments) {
  module.def(name, function, arguments..., py::call_guard<py::gil_scoped_release>());
}

void bind_threads(py::module_& module) {
  define(module, "indices", &selftest::indices, py::arg("grid"), py::arg("block"));
  define(module, "warp_words", &selftest::warp_words, py::arg("op"), py::arg("values"),
         py::arg("argument") = 0, py::arg("mask") = 0xffffffffu);
  define(module, "warp_doubles", &selftest::warp_doubles, py::arg("op"), py::arg("values"),
         py::arg("argument") = 0);
  define(module, "block_votes", &selftest::block_votes, py::arg("predicates"));
  define(module, "running_order", &selftest::running_order, py::arg("blocks"), py::arg("threads"));
  define(module, "block_sum", &selftest::block_sum, py::arg("values"), py::arg("with_barriers") = true);
  define(module, "pass_in_warp", &selftest::pass_in_warp, py::arg("values"), py::arg("with_barriers") = true);
  define(module, "pass_by_named_barriers", &selftest::pass_by_named_barriers, py::arg("values"));
  define(module, "grid_sum", &selftest::grid_sum, py::arg("values"), py::arg("blocks"));
}

void bind_memory(py::module_& module) {
  define(module, "uninitialised", &selftest::uninitialised, py::arg("count"));
  define(module, "write_shared", &selftest::write_shared, py::arg("bytes"), py::arg("offset"));
  define(module, "copy_vectors", &selftest::copy_vectors, py::arg("values"), py::arg("vector_bytes"),
         py::arg("streaming") = false, py::arg("shift") = 0);
  define(module, "async_tiles", &selftest::async_tiles, py::arg("values"), py::arg("bytes"),
         py::arg("pending"), py::arg("valid"));
  py::class_<selftest::Atomics>(module, "Atomics")
      .def_readonly("sums", &selftest::Atomics::sums)
      .def_readonly("extremes", &selftest::Atomics::extremes)
      .def_readonly("unsigned_extremes", &selftest::Atomics::unsigned_extremes)
      .def_readonly("exchanged", &selftest::Atomics::exchanged)
      .def_readonly("exchanged_long", &selftest::Atomics::exchanged_long)
      .def_readonly("counted", &selftest::Atomics::counted);
  define(module, "atomics", &selftest::atomics, py::arg("blocks"), py::arg("threads"));
}

void bind_arithmetic(py::module_& module) {
  define(module, "float_math", &selftest::float_math, py::arg("name"), py::arg("a"), py::arg("b"),
         py::arg("c"));
  define(module, "word_math", &selftest::word_math, py::arg("name"), py::arg("a"), py::arg("b"),
         py::arg("selector"));
  define(module, "narrow", &selftest::narrow, py::arg("type"), py::arg("values"));
  define(module, "widen", &selftest::widen, py::arg("type"), py::arg("bits"));
  define(module, "matrix_product", &selftest::matrix_product, py::arg("type"), py::arg("a"), py::arg("b"),
         py::arg("c"), py::arg("a_transposed"), py::arg("b_transposed"));
  define(module, "sparse_matrix_product", &selftest::sparse_matrix_product, py::arg("type"), py::arg("a"),
         py::arg("places"), py::arg("b"), py::arg("c"), py::arg("selector"));
}

void bind_hopper(py::module_& module) {
  define(module, "mbarrier_ring", &selftest::mbarrier_ring, py::arg("values"), py::arg("with_waits") = true);
  define(module, "tma_tile", &selftest::tma_tile, py::arg("values"), py::arg("sizes"), py::arg("strides"),
         py::arg("box"), py::arg("at"), py::arg("waits") = true);
  define(module, "wgmma_product", &selftest::wgmma_product, py::arg("type"), py::arg("a"), py::arg("b"),
         py::arg("columns"), py::arg("across"), py::arg("in_registers"), py::arg("fault") = 0);
  define(module, "tma_stored", &selftest::tma_stored, py::arg("tile"), py::arg("sizes"), py::arg("strides"),
         py::arg("box"), py::arg("at"));
  define(module, "hopper_order", &selftest::hopper_order, py::arg("what"), py::arg("lacks"));
  define(module, "hopper_orders", &selftest::hopper_orders);
  define(module, "hopper_misuse", &selftest::hopper_misuse, py::arg("what"));
  define(module, "hopper_misuses", &selftest::hopper_misuses);
}

void bind_misuse(py::module_& module) {
  define(module, "largest_params", &selftest::largest_params);
  define(module, "copy_and_fill", &selftest::copy_and_fill, py::arg("values"));
  define(module, "device_properties", &selftest::device_properties);
  define(module, "misuse", &selftest::misuse, py::arg("what"));
  define(module, "misuses", &selftest::misuses);
  define(module, "fail_in_odd_blocks", &selftest::fail_in_odd_blocks, py::arg("blocks"));
  module.attr("UNTOUCHED") = selftest::kUntouched;
  module.attr("ADDRESS_SANITIZER") = kAddressSanitizer;
}

void bind_options(py::module_& module) {
  module.def("emulator_set_seed", &set_seed, py::arg("seed"),
             "Choose the order in which the emulator runs blocks and threads.");
  module.def("emulator_set_threads", &set_threads, py::arg("threads"),
             "OS threads that share the blocks of a grid; 0 is the number of cores. ValueError if negative.");
  module.def("emulator_multiprocessors", &multiprocessors, "What kernels are told that the device has.");
  module.def("emulator_set_multiprocessors", &set_multiprocessors, py::arg("count"),
             "Choose it; at first it is 2. ValueError below 1.");
  module.def("emulator_compute_capability", &compute_capability, "Likewise, as 80 or 90.");
  module.def("emulator_set_compute_capability", &set_compute_capability, py::arg("number"),
             "Choose it; at first it is 80. ValueError for others than 80 and 90.");
}

}  // namespace

void bind_selftest(py::module_& module) {
  bind_options(module);
  py::module_ selftest =
      module.def_submodule("selftest", "Small kernels that show what the emulator promises.");
  bind_threads(selftest);
  bind_memory(selftest);
  bind_arithmetic(selftest);
  bind_hopper(selftest);
  bind_misuse(selftest);
}

}  // namespace tilewright::emulator
