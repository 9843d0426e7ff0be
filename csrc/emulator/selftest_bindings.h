#pragma once

namespace pybind11 {
class module_;
}

namespace tilewright::emulator {

// Adds emulator_set_seed and emulator_set_threads to the module, and the submodule `selftest`.
void bind_selftest(pybind11::module_& module);

}  // namespace tilewright::emulator
