// Which compiled instruction-set level the CPU kernels run at.
#pragma once

#include <string>
#include <vector>

namespace tilewright {

enum class CpuLevel : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

const char* name_of(CpuLevel level);

// The level in use: the highest usable one, or what the environment variable TILEWRIGHT_CPU names.
CpuLevel cpu_level();

void set_cpu_level(const std::string& name);

// Levels that were compiled and that this machine can run, lowest first.
std::vector<CpuLevel> usable_cpu_levels();

}  // namespace tilewright
