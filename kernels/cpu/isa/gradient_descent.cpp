// Gradient descent on one network: all of a step but the pairs, from the weight to the pre-activations and back.
//
// Both matrix products read the transposed input, whose columns are patches: the convolution by panels of columns, the
// weight's gradient by dot products along the columns. So neither pads the patch dimension, and the weight needs no
// packing.

#include <math.h>

#include "../kernels.h"
#include "../scratch.h"
#include "activation.h"
#include "exponential.h"
#include "gemm.h"
#include "sums.h"

namespace mixfeat::MIXFEAT_ISA {
namespace {

template <typename T>
void convolve(const GradientDescent<T>& a, int64_t begin, int64_t end) {
  for (int64_t q = begin; q < end; q += kPanel<T>) {
    gemm_panel<T>(round_up(a.filters, kRowGroup), min(kPanel<T>, end - q), a.patch_dim, a.weight, a.patch_dim, 1,
                  a.input + q, a.columns, a.s + q, a.columns, false);
  }
}

template <typename T>
void weight_gradient(const GradientDescent<T>& a, int64_t begin, int64_t end) {
  constexpr int columns = kLanes<T> >= 8 ? 4 : 2, rows = kLanes<T> / columns;  // of a tile: as many products as lanes
  for (int64_t q = begin; q < end; q += rows) {
    for (int64_t d = 0; d < a.patch_dim; d += columns) {
      const T *s = a.s + q * a.columns, *x = a.input + d * a.columns;
      Vec<T> sums[kLanes<T>] = {};
      for (int64_t k = 0; k < a.columns; k += kLanes<T>) {
        Vec<T> second[columns];
#pragma GCC unroll 4
        for (int j = 0; j < columns; ++j) second[j] = load(x + j * a.columns + k);
#pragma GCC unroll 4
        for (int i = 0; i < rows; ++i) {
          const Vec<T> first = load(s + i * a.columns + k);
#pragma GCC unroll 4
          for (int j = 0; j < columns; ++j) sums[i * columns + j] += first * second[j];
        }
      }
      T products[kLanes<T>];
      store(products, sum_each<T>(sums));
      for (int i = 0; i < rows && q + i < end; ++i) {
        for (int j = 0; j < columns && d + j < a.patch_dim; ++j)
          a.grad[(q + i) * a.patch_dim + d + j] = products[i * columns + j];
      }
    }
  }
}

// to = factor * from. Without `exact` up to half a vector behind the end is written as well.
template <typename T>
inline void scaled_copy(const T* from, T factor, T* to, int64_t count, bool exact) {
  constexpr int half = kVectorBytes / 2, half_lanes = kLanes<T> / 2;
  int64_t k = 0;
  for (; k + kLanes<T> <= count; k += kLanes<T>) store(to + k, load(from + k) * factor);
  for (; exact ? k + half_lanes <= count : k < count; k += half_lanes)
    store<half>(to + k, load<half>(from + k) * factor);
  for (; k < count; ++k) to[k] = from[k] * factor;
}

// The loops over filters keep what they need of `a` in registers: as far as compilers know, stores of vectors may
// change it.
template <typename T>
void pack(const GradientDescent<T>& a, T factor, int64_t begin, int64_t end, T* t) {
  const int64_t filters = a.filters / a.classes, classes = a.classes, patches = a.patches, columns = a.columns;
  const int64_t padded_length = a.padded_length, written = round_up(patches, kLanes<T> / 2);
  for (int64_t n = begin; n < end; ++n) {
    const T* from = a.s + n * patches;
    T* to = t + n * classes * padded_length;
    for (int64_t c = 0; c < classes; ++c, to += padded_length) {
      for (int64_t m = 0; m < filters; ++m, from += columns) {
        // unless exact, the next filters overwrite what is too much
        const bool exact = m * patches + written > filters * patches;
        scaled_copy(from, factor, to + m * patches, patches, exact);
      }
    }
  }
}

template <typename T>
void unpack(const GradientDescent<T>& a, T factor, int64_t begin, int64_t end, const T* t_grad) {
  const int64_t filters = a.filters / a.classes, classes = a.classes, patches = a.patches, columns = a.columns;
  const int64_t padded_length = a.padded_length, written = round_up(patches, kLanes<T> / 2);
  for (int64_t n = begin; n < end; ++n) {
    const bool exact = n * patches + written > end * patches;  // else the next samples overwrite what is too much
    const T* from = t_grad + n * classes * padded_length;
    T* to = a.s + n * patches;
    for (int64_t c = 0; c < classes; ++c, from += padded_length) {
      for (int64_t m = 0; m < filters; ++m, to += columns) {
        scaled_copy(from + m * patches, factor, to, patches, exact);
      }
    }
  }
}

template <typename T>
struct CrossEntropyBuffers {
  Scratch scratch;
  T* logits;  // (C, lanes)

  CrossEntropyBuffers(const GradientDescent<T>& a, void* memory)
      : scratch(memory), logits(scratch.take<T>(a.classes * kLanes<T>)) {}
};

template <typename T>
int64_t cross_entropy_scratch_bytes(const GradientDescent<T>& a) {
  return CrossEntropyBuffers<T>(a, nullptr).scratch.bytes();
}

// A lane is a sample, so no sum crosses lanes.
template <typename T, int kDegree>
double cross_entropy_of(const GradientDescent<T>& a, int64_t block, void* memory) {
  constexpr int lanes = kLanes<T>;
  const Activation<T, kDegree, true> phi(a.activation);
  const Vec<T> per_threshold = broadcast(T(1 / a.activation.threshold));
  const int64_t filters = a.filters / a.classes, first = block * lanes, count = min(lanes, a.samples - first);
  T* const s = a.s + block * lanes * a.patches;
  T* const logits = CrossEntropyBuffers<T>(a, memory).logits;
  const auto negative = [&](int64_t c) { return a.negative_filters ? a.negative_filters[c] : 0; };
  Vec<T> max = {};
  for (int64_t c = 0; c < a.classes; ++c) {
    Vec<T> sums[4] = {};
    for (int64_t m = 0; m < filters; ++m) {
      const T* row = s + (c * filters + m) * a.columns;
      int64_t p = 0;
      for (; p + 4 <= a.patches; p += 4) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) sums[k] = phi.add_to(sums[k], load(row + (p + k) * lanes) * per_threshold);
      }
      for (; p < a.patches; ++p) sums[0] = phi.add_to(sums[0], load(row + p * lanes) * per_threshold);
      if (m + 1 == negative(c)) {
        for (Vec<T>& sum : sums) sum = -sum;
      }
    }
    const Vec<T> sum =
        ((sums[0] + sums[1]) + (sums[2] + sums[3])) * broadcast(T(a.activation.scale / a.activation.degree));
    store(logits + c * lanes, sum);
    max = c ? clamp_min<T>(max, sum) : sum;
  }
  T target_logit[lanes];
  for (int k = 0; k < count; ++k) target_logit[k] = logits[a.target[first + k] * lanes + k];
  Vec<T> total = {}, shifted_sum = {};
  for (int64_t c = 0; c < a.classes; ++c) {
    const Vec<T> shifted = load(logits + c * lanes) - max, e = exponential(shifted);
    total += e;
    shifted_sum += shifted;
    store(logits + c * lanes, e);
  }
  const bool smooth = a.label_smoothing != 0;
  const double one_minus_eps = 1 - a.label_smoothing, eps_share = a.label_smoothing / a.classes;
  double loss = 0;
  for (int k = 0; k < count; ++k) {
    loss += one_minus_eps * (double(max[k]) - double(target_logit[k])) + ::log(double(total[k]));
    if (smooth) loss -= eps_share * double(shifted_sum[k]);
  }

  // D / N in the logits' place, and from there the gradient
  const T factor = T(a.activation.scale / a.activation.threshold / a.samples);
  const Vec<T> norm = broadcast(factor) / total;
  for (int64_t c = 0; c < a.classes; ++c)
    store(logits + c * lanes, load(logits + c * lanes) * norm - broadcast(T(eps_share) * factor));
  for (int k = 0; k < count; ++k) logits[a.target[first + k] * lanes + k] -= T(one_minus_eps) * factor;
  for (int64_t c = 0; c < a.classes; ++c) {
    for (int64_t k = count; k < lanes; ++k) logits[c * lanes + k] = 0;  // padding
    const Vec<T> d = load(logits + c * lanes);
    for (int64_t m = 0; m < filters; ++m) {
      T* row = s + (c * filters + m) * a.columns;
      const Vec<T> of_filter = m < negative(c) ? -d : d;
      for (int64_t p = 0; p < a.patches; ++p) {
        store(row + p * lanes, phi.slope_times(load(row + p * lanes) * per_threshold, of_filter));
      }
    }
  }
  return loss / a.samples;
}

template <typename T>
double cross_entropy(const GradientDescent<T>& a, int64_t block, void* scratch) {
  const auto f =
      instance(a.activation, [](auto degree, auto) { return &cross_entropy_of<T, decltype(degree)::value>; });
  return f(a, block, scratch);
}

template <typename T>
void update(const GradientDescent<T>& a, T lr, T momentum, T weight_decay) {
  for (int64_t k = 0; k < a.filters * a.patch_dim; ++k) {
    T change = a.grad[k] + weight_decay * a.weight[k];
    if (a.momentum_buffer) a.momentum_buffer[k] = change = momentum * a.momentum_buffer[k] + change;
    a.weight[k] -= lr * change;
  }
}

}  // namespace

template <typename T>
GradientDescentKernels<T> gradient_descent() {
  return {kLanes<T>, kPanel<T>,        convolve<T>,
          weight_gradient<T>, pack<T>, unpack<T>, cross_entropy<T>, cross_entropy_scratch_bytes<T>, update<T>};
}
template GradientDescentKernels<float> gradient_descent();
template GradientDescentKernels<double> gradient_descent();

}  // namespace mixfeat::MIXFEAT_ISA
