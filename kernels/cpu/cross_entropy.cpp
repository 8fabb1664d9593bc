// Cross-entropy of one row of logits, with its gradient; compiled once per instruction set (see build.py).
//
// Three passes over a row: its greatest logit; exponentials and sums; the gradient. Only the first reads from memory, the others
// find the row in a cache. Exponentials are kept where the gradient goes, or in scratch if its elements are too narrow.

#include "cross_entropy.h"

#include <math.h>
#include <string.h>

#include <limits>
#include <type_traits>

#include "exponential.h"

namespace mixfeat {
namespace MIXFEAT_ISA {
namespace {

// Whether a lane is one of the first `count`.
template <typename T>
inline auto first_lanes(int64_t count) {
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  Integers<Lane, T> numbers{};
  for (int k = 0; k < kLanes<T>; ++k) numbers[k] = k;
  return numbers < Lane(count);
}

// The first `count` elements, the other lanes being `rest`.
template <typename T, typename E>
inline Vec<T> load_first(const E* p, int64_t count, T rest) {
  E padded[kLanes<T>] = {};
  memcpy(padded, p, count * sizeof(E));
  return first_lanes<T>(count) ? load_as<T>(padded) : broadcast(rest);
}

template <typename T, typename E>
inline void store_first(E* p, int64_t count, Vec<T> v) {
  E padded[kLanes<T>];
  store_as(padded, v);
  memcpy(p, padded, count * sizeof(E));
}

template <typename T>
inline T sum_of_lanes(Vec<T> v) {
  T sum = 0;
  for (int k = 0; k < kLanes<T>; ++k) sum += v[k];
  return sum;
}

template <typename T, typename E>
T greatest(const E* x, int64_t classes) {
  constexpr int lanes = kLanes<T>, several = 4;
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  Vec<T> best[several];
  for (int j = 0; j < several; ++j) best[j] = broadcast(lowest);
  int64_t c = 0;
  for (; c + several * lanes <= classes; c += several * lanes) {
#pragma GCC unroll 4
    for (int j = 0; j < several; ++j) best[j] = at_least<T>(load_as<T>(x + c + j * lanes), best[j]);
  }
  for (; c < classes; c += lanes) {
    const int64_t count = classes - c;
    best[0] = at_least<T>(count >= lanes ? load_as<T>(x + c) : load_first<T>(x + c, count, lowest), best[0]);
  }
  for (int j = 1; j < several; ++j) best[0] = at_least<T>(best[j], best[0]);
  T result = best[0][0];
  for (int k = 1; k < lanes; ++k) result = best[0][k] > result ? best[0][k] : result;
  return result;
}

// Sums over the classes, x being what remains of a logit beyond the greatest.
template <typename T>
struct Sums {
  Vec<T> exponential{}, logit{}, target{}, product{};  // of e^x, x, target, target * x

  void operator+=(const Sums& other) {
    exponential += other.exponential;
    logit += other.logit;
    target += other.target;
    product += other.product;
  }
};

template <typename T, typename E, typename L, bool kDense>
double cross_entropy_of(const void* logits, int64_t classes, const Label& label, void* scratch, void* grad_pointer) {
  constexpr int lanes = kLanes<T>, several = 4;
  const E* x = static_cast<const E*>(logits);
  const L* target = static_cast<const L*>(label.target);
  E* grad = static_cast<E*>(grad_pointer);
  T* kept = std::is_same_v<T, E> ? reinterpret_cast<T*>(grad) : static_cast<T*>(scratch);

  const T highest = greatest<T>(x, classes);
  Sums<T> sums[several];
  const auto add = [&](Sums<T>& to, Vec<T> remaining, Vec<T> e, Vec<T> t) {
    to.exponential += e;
    if (label.base != 0) to.logit += remaining;
    if (kDense) {
      to.target += t;
      to.product += t * remaining;
    }
  };
  int64_t c = 0;
  for (; c + several * lanes <= classes; c += several * lanes) {
#pragma GCC unroll 4
    for (int j = 0; j < several; ++j) {
      const int64_t at = c + j * lanes;
      const Vec<T> remaining = load_as<T>(x + at) - broadcast(highest), e = exponential(remaining);
      if (grad) store(kept + at, e);
      add(sums[j], remaining, e, kDense ? load_as<T>(target + at) : Vec<T>{});
    }
  }
  for (; c < classes; c += lanes) {
    const int64_t count = classes - c;
    const auto inside = first_lanes<T>(count < lanes ? count : lanes);
    const Vec<T> remaining = (count >= lanes ? load_as<T>(x + c) : load_first<T>(x + c, count, highest)) - broadcast(highest);
    const Vec<T> e = inside ? exponential(remaining) : Vec<T>{};
    if (grad) store_first<T>(kept + c, count < lanes ? count : lanes, e);
    add(sums[0], remaining, e,
        !kDense ? Vec<T>{} : count >= lanes ? load_as<T>(target + c) : load_first<T>(target + c, count, T(0)));
  }
  for (int j = 1; j < several; ++j) sums[0] += sums[j];
  const double sum = sum_of_lanes<T>(sums[0].exponential);
  double total = classes * label.base, loss = 0;
  if (label.base != 0) loss -= label.base * sum_of_lanes<T>(sums[0].logit);
  if (kDense) {
    total += label.scale * sum_of_lanes<T>(sums[0].target);
    loss -= label.scale * sum_of_lanes<T>(sums[0].product);
  } else {
    for (int j = 0; j < 2; ++j) {
      if (label.values[j] == 0) continue;
      total += label.values[j];
      loss -= label.values[j] * (load_first<T>(x + label.classes[j], 1, T(0))[0] - highest);
    }
  }
  loss += total * ::log(sum);
  if (!grad) return loss;

  const T ratio = total / sum;
  T own[2];
  for (int j = 0; !kDense && j < 2; ++j) own[j] = label.values[j] == 0 ? 0 : kept[label.classes[j]];
  const auto slope = [&](Vec<T> e, Vec<T> t) {
    const Vec<T> shared = e * broadcast(ratio) - broadcast(T(label.base));
    return kDense ? shared - broadcast(T(label.scale)) * t : shared;
  };
  for (c = 0; c + lanes <= classes; c += lanes) {
    store_as(grad + c, slope(load(kept + c), kDense ? load_as<T>(target + c) : Vec<T>{}));
  }
  if (c < classes) {
    const int64_t count = classes - c;
    store_first<T>(grad + c, count,
                   slope(load_first<T>(kept + c, count, T(0)), kDense ? load_first<T>(target + c, count, T(0)) : Vec<T>{}));
  }
  for (int j = 0; !kDense && j < 2; ++j) {
    if (label.values[j] == 0) continue;
    const bool both = label.classes[0] == label.classes[1];
    const T value = both ? label.values[0] + label.values[1] : label.values[j];
    store_first<T>(grad + label.classes[j], 1, slope(broadcast(own[j]), Vec<T>{}) - broadcast(value));
  }
  return loss;
}

template <typename T, typename E>
CrossEntropy with_target(bool dense, bool wide) {
  if (!dense) return cross_entropy_of<T, E, E, false>;
  return wide ? cross_entropy_of<T, E, T, true> : cross_entropy_of<T, E, E, true>;
}

}  // namespace

CrossEntropy cross_entropy(Element logits, Element target) {
  const bool dense = target != Element::kByte, wide = target == Element::kFloat;
  if (dense && target != logits && !(wide && logits != Element::kDouble)) return nullptr;
  switch (logits) {
    case Element::kFloat:
      return with_target<float, float>(dense, wide);
    case Element::kDouble:
      return with_target<double, double>(dense, false);
    case Element::kBFloat16:
      return with_target<float, BFloat16>(dense, wide);
    case Element::kHalf:
      return with_target<float, Half>(dense, wide);
    default:
      return nullptr;
  }
}

}  // namespace MIXFEAT_ISA
}  // namespace mixfeat
