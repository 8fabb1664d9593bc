// Tools that the operators share: kernels of the instruction set, tensors, tasks. The operators use PyTorch's stable
// ABI, so that one build serves later releases.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace mixfeat {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernels of the best instruction set that this processor has, or of the lesser one that MIXFEAT_CPU_CAPABILITY
// names. The first call chooses.
const Kernels& kernels();

template <typename T>
const TypedKernels<T>& typed_kernels() {
  if constexpr (sizeof(T) == 4) {
    return kernels().float32;
  } else {
    return kernels().float64;
  }
}

// The activation from the fields of kernels/polynomial.py, in their order: how every schema passes it.
Polynomial polynomial_of(const std::vector<double>& fields);

template <typename E>
constexpr ScalarType kType = std::is_same_v<E, BFloat16> ? ScalarType::BFloat16
                             : std::is_same_v<E, float>  ? ScalarType::Float
                                                         : ScalarType::Double;

inline Tensor empty(const std::vector<int64_t>& size, ScalarType type) { return torch::stable::empty(size, type); }

// For results of many megabytes: asks the system for huge pages. It takes longer to find and clear ordinary pages than
// a kernel takes to fill them.
Tensor empty_large(const std::vector<int64_t>& size, ScalarType type);

Element element_of(ScalarType type);
int64_t bytes_of(Element element);

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Whether all of `index`, contiguous int64, lie in [0, size), and all of `lam`, () or (N,) of float or double, in
// [0, 1]. Values are checked where they are read: an operator refuses, and Python says why (mixfeat/_checks.py).
bool all_within(const Tensor& index, int64_t size);
bool all_fractions(const Tensor& lam);

inline std::vector<int64_t> shape_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// Calls f(n, begin, end) for elements [begin, end) of every sample n: a part of a sample is a task.
template <typename F>
void for_each_part(int64_t samples, int64_t size, const F& f) {
  constexpr int64_t kElementsPerTask = 1 << 15;  // a thread gets at least twice as many
  const int64_t parts = std::max<int64_t>(1, size / kElementsPerTask);
  torch::stable::parallel_for(0, samples * parts, 1 + 2 * kElementsPerTask * parts / std::max<int64_t>(1, size),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t task = begin; task < end; ++task) {
                                  const int64_t n = task / parts, part = task % parts;
                                  f(n, size * part / parts, size * (part + 1) / parts);
                                }
                              });
}

// Threads with a scratch memory each.
struct Team {
  int64_t threads;
  char* scratch;
  int64_t scratch_bytes;  // of each thread

  // Runs f(task, scratch) for all tasks. Each thread takes a contiguous share of them. One more thread is used for
  // every 2^22 of `work`, counted in multiply-adds: with less to do, waiting for a thread can take longer than doing
  // without it, and on a busy machine takes much longer.
  template <typename F>
  void operator()(int64_t tasks, int64_t work, const F& f) const {
    const int64_t shares = std::min<int64_t>({tasks, std::max<int64_t>(1, work >> 22), threads});
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t share = begin; share < end; ++share) {
        for (int64_t task = tasks * share / shares; task < tasks * (share + 1) / shares; ++task) {
          f(task, static_cast<void*>(scratch + share * scratch_bytes));
        }
      }
    };
    if (shares > 1) {
      torch::stable::parallel_for(0, shares, 1, run);
    } else if (shares == 1) {
      run(0, 1);
    }
  }
};

// The same for one loop alone.
template <typename F>
void for_each_task(int64_t tasks, int64_t work, int64_t scratch_bytes, const F& f) {
  const int64_t threads =
      std::min<int64_t>({tasks, std::max<int64_t>(1, work >> 22), torch::stable::get_num_threads()});
  scratch_bytes = round_up(scratch_bytes, 64);  // whole cache lines
  const auto run = [&](char* scratch) { Team{threads, scratch, scratch_bytes}(tasks, work, f); };
  if (scratch_bytes == 0) return run(nullptr);
  run(data<char>(empty({threads, scratch_bytes}, ScalarType::Byte)));
}

}  // namespace mixfeat
