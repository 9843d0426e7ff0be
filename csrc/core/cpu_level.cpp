// Compiled without any instruction-set flag: it runs before we know what the machine can do.
#include "core/cpu_level.h"

#include <atomic>
#include <cstdlib>

#include "core/check.h"

namespace tilewright {
namespace {

bool machine_supports(CpuLevel level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (level) {
    case CpuLevel::kBaseline:
      return true;
    case CpuLevel::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case CpuLevel::kAvx512:
      return __builtin_cpu_supports("x86-64-v4");
    case CpuLevel::kAvx512Bf16:
      return machine_supports(CpuLevel::kAvx512) && __builtin_cpu_supports("avx512bf16") &&
             __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
  }
  return false;
#else
  return level == CpuLevel::kBaseline;
#endif
}

std::string usable_names() {
  std::string names;
  for (CpuLevel level : usable_cpu_levels()) names += str(names.empty() ? "" : ", ", name_of(level));
  return names;
}

CpuLevel level_named(const std::string& name, const char* argument) {
  for (CpuLevel level : usable_cpu_levels()) {
    if (name == name_of(level)) return level;
  }
  fail(ErrorKind::kValue, argument, ": got '", name, "', this machine can run: ", usable_names());
}

std::atomic<int> chosen_level{-1};

}  // namespace

const char* name_of(CpuLevel level) {
  switch (level) {
    case CpuLevel::kBaseline:
      return "baseline";
    case CpuLevel::kAvx2:
      return "avx2";
    case CpuLevel::kAvx512:
      return "avx512";
    case CpuLevel::kAvx512Bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

std::vector<CpuLevel> usable_cpu_levels() {
  std::vector<CpuLevel> usable;
  for (CpuLevel level : {CpuLevel::kBaseline, CpuLevel::kAvx2, CpuLevel::kAvx512, CpuLevel::kAvx512Bf16}) {
    if (machine_supports(level)) usable.push_back(level);
  }
  return usable;
}

CpuLevel cpu_level() {
  const int chosen = chosen_level.load(std::memory_order_relaxed);
  if (chosen >= 0) return CpuLevel(chosen);
  const char* forced = std::getenv("TILEWRIGHT_CPU");
  const CpuLevel level = forced != nullptr && *forced != '\0'
                             ? level_named(forced, "environment variable TILEWRIGHT_CPU")
                             : usable_cpu_levels().back();
  chosen_level.store(int(level), std::memory_order_relaxed);
  return level;
}

void set_cpu_level(const std::string& name) { chosen_level.store(int(level_named(name, "level"))); }

}  // namespace tilewright
