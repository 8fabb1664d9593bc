// Cross-entropy of one row of logits, with its gradient.
//
// Three passes over a row: the largest logit; exponentials and sums; the gradient. Only the first reads from memory,
// the others find the row in a cache. Exponentials are kept where the gradient goes, or in scratch if the elements
// there are too narrow. A row of one or two vectors stays in registers: a processor waits long for what it has just
// written through a mask.

#include <math.h>

#include "../kernels.h"
#include "element.h"
#include "exponential.h"
#include "sums.h"

namespace mixfeat::MIXFEAT_ISA {
namespace {

constexpr int kUnroll = 4;

// The largest lane of a vector.
template <typename T, int kBlock = kLanes<T> / 2, int... kIndices>
inline T max_of_lanes(Vec<T> v, std::integer_sequence<int, kIndices...> lanes) {
  if constexpr (kBlock == 0) {
    return v[0];
  } else {
    return max_of_lanes<T, kBlock / 2>(clamp_min<T>(v, __builtin_shufflevector(v, v, (kIndices ^ kBlock)...)), lanes);
  }
}

template <typename T, typename E>
T max_logit(const E* x, int64_t classes) {
  constexpr int lanes = kLanes<T>;
  Vec<T> max[kUnroll];
  for (int j = 0; j < kUnroll; ++j) max[j] = broadcast(-kInfinity<T>);
  int64_t c = 0;
  for (; c + kUnroll * lanes <= classes; c += kUnroll * lanes) {
#pragma GCC unroll 4
    for (int j = 0; j < kUnroll; ++j) max[j] = clamp_min<T>(max[j], load_as<T>(x + c + j * lanes));
  }
  for (; c < classes; c += lanes) max[0] = clamp_min<T>(max[0], load_first<T>(x + c, classes - c, -kInfinity<T>));
  for (int j = 1; j < kUnroll; ++j) max[0] = clamp_min<T>(max[0], max[j]);
  return max_of_lanes<T>(max[0], LaneIndices<T>());
}

// Sums over the classes, with x the logit less the largest one.
template <typename T>
struct Sums {
  Vec<T> exponential{}, logit{}, target{}, product{};  // of e^x, x, target, label * x

  void operator+=(const Sums& other) {
    exponential += other.exponential;
    logit += other.logit;
    target += other.target;
    product += other.product;
  }
};

// The loss of a row x; `total` becomes the weight of the softmax in its gradient.
template <bool kDense, typename T, typename E>
LossAndLse loss_of(const Label& label, const E* x, int64_t classes, T max, T sum, const Sums<T>& sums, double& total) {
  double loss = 0;
  total = classes * label.base;
  if (kDense) {
    total += label.scale * sum_of_lanes<T>(sums.target);
    loss -= sum_of_lanes<T>(sums.product);
  } else {
    if (label.base != 0) loss -= label.base * sum_of_lanes<T>(sums.logit);
    for (int j = 0; j < 2; ++j) {
      if (label.classes[j] < 0) continue;
      total += label.values[j];
      loss -= label.values[j] * (load_one<T>(x + label.classes[j]) - max);  // a product of its own: 0 * inf is NaN
    }
  }
  const double log_sum = sizeof(T) == 4 ? ::logf(sum) : ::log(sum), lse = max + log_sum;
  loss += total * log_sum;
  if (label.lse != 0) loss += label.lse * lse;
  total += label.lse;
  if (label.lse_square != 0) {
    loss += label.lse_square * lse * lse;
    total += 2 * label.lse_square * lse;
  }
  return {loss, lse};
}

// A row of at most kVectors vectors.
template <typename T, typename E, typename L, bool kDense, int kVectors>
LossAndLse short_cross_entropy(const E* x, int64_t classes, const Label& label, E* grad) {
  constexpr int lanes = kLanes<T>;
  Vec<T> logit[kVectors], weight[kVectors], e[kVectors], max_logits = broadcast(-kInfinity<T>);
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    logit[v] = load_first<T>(x + v * lanes, classes - v * lanes, -kInfinity<T>);
    max_logits = clamp_min<T>(max_logits, logit[v]);
  }
  const T max = max_of_lanes<T>(max_logits, LaneIndices<T>());
  Sums<T> sums;
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const int64_t count = classes - v * lanes;
    const auto mask = first_lanes<T>(count);
    logit[v] = mask ? logit[v] - broadcast(max) : Vec<T>{};
    e[v] = mask ? exponential(logit[v]) : Vec<T>{};
    weight[v] = mask ? broadcast(T(label.base)) : Vec<T>{};
    if (kDense) {
      const Vec<T> t = load_first<T>(static_cast<const L*>(label.target) + v * lanes, count, T(0));
      weight[v] += broadcast(T(label.scale)) * t;
      sums.target += t;
      sums.product += weight[v] * logit[v];
    } else {
      for (int j = 0; j < 2; ++j) {
        const double value = label.classes[0] == label.classes[1] ? label.values[0] + label.values[1] : label.values[j];
        weight[v] =
            lane_numbers<T>() == Lane<T>(label.classes[j] - v * lanes) ? broadcast(T(label.base + value)) : weight[v];
      }
      sums.logit += logit[v];
    }
    sums.exponential += e[v];
  }
  const T sum = sum_of_lanes<T>(sums.exponential);
  double total;
  const LossAndLse result = loss_of<kDense>(label, x, classes, max, sum, sums, total);
  if (!grad) return result;
  const Vec<T> softmax_scale = broadcast(T(total / sum));
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v)
    store_first<T>(grad + v * lanes, classes - v * lanes, e[v] * softmax_scale - weight[v]);
  return result;
}

template <typename T, typename E, typename L, bool kDense>
LossAndLse cross_entropy_of(const void* logits, int64_t classes, const Label& label, void* scratch,
                            void* grad_pointer) {
  constexpr int lanes = kLanes<T>;
  const E* x = static_cast<const E*>(logits);
  const L* target = static_cast<const L*>(label.target);
  E* grad = static_cast<E*>(grad_pointer);
  if (classes <= lanes) return short_cross_entropy<T, E, L, kDense, 1>(x, classes, label, grad);
  if (classes <= 2 * lanes) return short_cross_entropy<T, E, L, kDense, 2>(x, classes, label, grad);
  T* exponentials = std::is_same_v<T, E> ? reinterpret_cast<T*>(grad) : static_cast<T*>(scratch);

  const T max = max_logit<T>(x, classes);
  Sums<T> sums[kUnroll];
  const auto add = [&](Sums<T>& to, Vec<T> logit, Vec<T> e, Vec<T> t) {
    to.exponential += e;
    if (kDense) {
      to.target += t;
      to.product += (broadcast(T(label.scale)) * t + broadcast(T(label.base))) * logit;  // one product: 0 * inf is NaN
    } else if (label.base != 0) {
      to.logit += logit;
    }
  };
  int64_t c = 0;
  for (; c + kUnroll * lanes <= classes; c += kUnroll * lanes) {
#pragma GCC unroll 4
    for (int j = 0; j < kUnroll; ++j) {
      const int64_t at = c + j * lanes;
      const Vec<T> logit = load_as<T>(x + at) - broadcast(max), e = exponential(logit);
      if (grad) store(exponentials + at, e);
      add(sums[j], logit, e, kDense ? load_as<T>(target + at) : Vec<T>{});
    }
  }
  for (; c < classes; c += lanes) {
    const int64_t count = classes - c;
    const auto mask = first_lanes<T>(min(count, lanes));
    const Vec<T> logit = load_first<T>(x + c, count, max) - broadcast(max);
    const Vec<T> e = mask ? exponential(logit) : Vec<T>{};
    if (grad) store_first<T>(exponentials + c, count, e);
    add(sums[0], logit, e, kDense ? load_first<T>(target + c, count, T(0)) : Vec<T>{});
  }
  for (int j = 1; j < kUnroll; ++j) sums[0] += sums[j];
  const T sum = sum_of_lanes<T>(sums[0].exponential);
  double total;
  const LossAndLse result = loss_of<kDense>(label, x, classes, max, sum, sums[0], total);
  if (!grad) return result;

  const T softmax_scale = total / sum;
  T label_exponentials[2];  // exponentials of the label's classes, which the gradient may overwrite
  for (int j = 0; !kDense && j < 2; ++j)
    label_exponentials[j] = label.classes[j] < 0 ? 0 : exponentials[label.classes[j]];
  const auto gradient = [&](Vec<T> e, Vec<T> t) {
    const Vec<T> smooth = e * broadcast(softmax_scale) - broadcast(T(label.base));
    return kDense ? smooth - broadcast(T(label.scale)) * t : smooth;
  };
  for (c = 0; c + lanes <= classes; c += lanes) {
    store_as(grad + c, gradient(load(exponentials + c), kDense ? load_as<T>(target + c) : Vec<T>{}));
  }
  if (c < classes) {
    const int64_t count = classes - c;
    const Vec<T> t = kDense ? load_first<T>(target + c, count, T(0)) : Vec<T>{};
    store_first<T>(grad + c, count, gradient(load_first<T>(exponentials + c, count, T(0)), t));
  }
  for (int j = 0; !kDense && j < 2; ++j) {
    if (label.classes[j] < 0) continue;
    const bool same_class = label.classes[0] == label.classes[1];
    const T value = same_class ? label.values[0] + label.values[1] : label.values[j];
    store_one<T>(grad + label.classes[j], label_exponentials[j] * softmax_scale - T(label.base) - value);
  }
  return result;
}

template <typename T, typename E>
CrossEntropy with_target(bool dense, bool float_target) {
  if (!dense) return cross_entropy_of<T, E, E, false>;
  return float_target ? cross_entropy_of<T, E, T, true> : cross_entropy_of<T, E, E, true>;
}

}  // namespace

CrossEntropy cross_entropy(Element logits, Element target) {
  const bool dense = target != Element::kByte, float_target = target == Element::kFloat;
  if (dense && target != logits && !(float_target && logits != Element::kDouble)) return nullptr;
  switch (logits) {
    case Element::kFloat:
      return with_target<float, float>(dense, float_target);
    case Element::kDouble:
      return with_target<double, double>(dense, false);
    case Element::kBFloat16:
      return with_target<float, BFloat16>(dense, float_target);
    case Element::kHalf:
      return with_target<float, Half>(dense, float_target);
    default:
      return nullptr;
  }
}

}  // namespace mixfeat::MIXFEAT_ISA
