// The CPU library: torch.ops.mixfeat_cpu. Each operator's bindings are in a file of their own.

#include "library.h"

#include <cstdlib>

namespace mixfeat {
namespace {

std::string best_capability() {
  int level = 0;
#if defined(MIXFEAT_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) level = 1;
  if (level && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    level = 2;
  }
#endif
  const char* names[] = {"generic", "avx2", "avx512"};
  if (const char* wish = std::getenv("MIXFEAT_CPU_CAPABILITY")) {
    for (int i = 0; i < level; ++i) {
      if (std::string(wish) == names[i]) return names[i];
    }
  }
  return names[level];
}

std::string capability_name() { return capability(); }

}  // namespace

const std::string& capability() {
  static const std::string name = best_capability();
  return name;
}

}  // namespace mixfeat

STABLE_TORCH_LIBRARY(mixfeat_cpu, m) { m.def("capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(mixfeat_cpu, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&mixfeat::capability_name));
}
