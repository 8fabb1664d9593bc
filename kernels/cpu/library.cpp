// The CPU library, torch.ops.mixfeat_cpu. Each operator has a file of its own.

#include "library.h"

#include <cstdlib>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if __has_include(<sys/single_threaded.h>)
#include <sys/single_threaded.h>

// Stands in for the variable of glibc 2.32, which older systems lack. libstdc++ asks it whether counting references
// needs atomics.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
#endif

namespace mixfeat {
namespace {

struct InstructionSet {
  const char* name;
  Kernels (*kernels)();
};

InstructionSet choose() {
  std::vector<InstructionSet> available = {{"generic", generic::kernels}};
#if defined(MIXFEAT_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    available.push_back({"avx2", avx2::kernels});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
      available.push_back({"avx512", avx512::kernels});
      if (__builtin_cpu_supports("avx512bf16")) available.push_back({"avx512_bf16", avx512_bf16::kernels});
    }
  }
#endif
  if (const char* wanted = std::getenv("MIXFEAT_CPU_CAPABILITY")) {
    for (const InstructionSet& set : available) {
      if (std::string(wanted) == set.name) return set;
    }
  }
  return available.back();
}

const InstructionSet& instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

std::string capability() { return instruction_set().name; }

}  // namespace

const Kernels& kernels() {
  static const Kernels table = instruction_set().kernels();
  return table;
}

Polynomial polynomial_of(const std::vector<double>& fields) {
  STD_TORCH_CHECK(fields.size() == 6 && (fields[3] != 0 || fields[5] == 0), "unexpected activation");
  STD_TORCH_CHECK(fields[0] >= 1 && fields[0] <= kMaxDegree, "degree out of range");
  return {int64_t(fields[0]), fields[1], fields[2], fields[3] != 0, fields[4] != 0, fields[5]};
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

bool all_within(const Tensor& index, int64_t size) {
  const int64_t* values = data<int64_t>(index);
  return std::all_of(values, values + index.numel(), [&](int64_t value) { return 0 <= value && value < size; });
}

template <typename T>
static bool all_fractions_of(const Tensor& lam) {
  const T* values = data<T>(lam);
  const int64_t stride = lam.dim() ? lam.stride(0) : 0;
  for (int64_t n = 0; n < lam.numel(); ++n) {
    if (!(values[n * stride] >= 0 && values[n * stride] <= 1)) return false;
  }
  return true;
}

bool all_fractions(const Tensor& lam) {
  if (lam.scalar_type() == ScalarType::Float) return all_fractions_of<float>(lam);
  STD_TORCH_CHECK(lam.scalar_type() == ScalarType::Double, "unexpected lam");
  return all_fractions_of<double>(lam);
}

int64_t bytes_of(Element element) {
  constexpr int64_t bytes[] = {4, 8, 2, 2, 1};
  return bytes[int(element)];
}

}  // namespace mixfeat

STABLE_TORCH_LIBRARY(mixfeat_cpu, m) { m.def("capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(mixfeat_cpu, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&mixfeat::capability));
}
