// The CPU library: torch.ops.mixfeat_cpu. Each operator's bindings are in a file of their own.

#include "library.h"

#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

Tensor empty_large(const std::vector<int64_t>& size, ScalarType type) {
  Tensor t = empty(size, type);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + t.numel() * bytes_of(element_of(type))) / kHugePage * kHugePage;
  if (last > first + kHugePage) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return t;
}

Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::Double:
      return Element::kDouble;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kHalf;
    default:
      STD_TORCH_CHECK(type == ScalarType::Byte, "unexpected dtype");
      return Element::kByte;
  }
}

int64_t bytes_of(Element element) {
  constexpr int64_t bytes[] = {4, 8, 2, 2, 1};
  return bytes[int(element)];
}

}  // namespace mixfeat

STABLE_TORCH_LIBRARY(mixfeat_cpu, m) { m.def("capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(mixfeat_cpu, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&mixfeat::capability_name));
}
