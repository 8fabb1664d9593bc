// What the operators of the CPU library share: instruction set, tensors, tasks. On PyTorch's stable ABI, so that one build
// serves later releases.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "element.h"

namespace mixfeat {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// "avx512", "avx2" or "generic": the best that this processor has, or the lesser one that MIXFEAT_CPU_CAPABILITY asks for.
const std::string& capability();

// The table NAME_float or NAME_double of the instruction set in use, as TABLE<T>.
#if defined(MIXFEAT_X86)
#define MIXFEAT_SELECT(NAME, TYPE) \
  (capability() == "avx512" ? &avx512::NAME##_##TYPE : capability() == "avx2" ? &avx2::NAME##_##TYPE : &generic::NAME##_##TYPE)
#else
#define MIXFEAT_SELECT(NAME, TYPE) (&generic::NAME##_##TYPE)
#endif

template <typename T>
constexpr ScalarType kType = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

inline Tensor empty(const std::vector<int64_t>& size, ScalarType type) { return torch::stable::empty(size, type); }

// The same for results of many megabytes, in huge pages where there are such: the system takes longer to find and clear
// ordinary ones than a kernel takes to fill them.
Tensor empty_large(const std::vector<int64_t>& size, ScalarType type);

Element element_of(ScalarType type);
int64_t bytes_of(Element element);

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

inline std::vector<int64_t> shape_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// Runs f(task, scratch) for all tasks; each thread takes a contiguous share of them and has its own scratch. A further thread
// is used for every 2^22 of `work`, counted in multiply-adds: with less to do, waiting for it can take longer, and on a busy
// machine takes much longer, than going without.
template <typename T, typename F>
void for_each_task(int64_t tasks, int64_t work, int64_t scratch_size, const F& f) {
  const int64_t useful = std::max<int64_t>(1, work >> 22);
  const int64_t threads = std::min<int64_t>({tasks, useful, torch::stable::get_num_threads()});
  if (threads == 0) return;
  scratch_size = (scratch_size + 15) / 16 * 16;  // whole cache lines
  const Tensor scratch = empty({threads, scratch_size}, kType<T>);
  T* base = data<T>(scratch);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t task = tasks * thread / threads; task < tasks * (thread + 1) / threads; ++task) {
        f(task, base + thread * scratch_size);
      }
    }
  });
}

}  // namespace mixfeat
