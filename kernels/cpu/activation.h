// The activation family of kernels/polynomial.py, on vectors of t = z / threshold:
//   phi  / scale              = u^degree / degree + max(t - 1, 0) [if Upper],   u = t, >= 0 if lower, <= 1 if Upper
//   phi' / (scale / threshold) = u^(degree - 1), the step [t > 0] for degree 1 with lower
#pragma once

#include <limits>

#include "simd.h"

namespace mixfeat {
namespace {

template <int kExponent, typename T>
inline Vec<T> power(Vec<T> u) {
  if constexpr (kExponent == 0) {
    return broadcast(T(1));
  } else if constexpr (kExponent == 1) {
    return u;
  } else if constexpr (kExponent % 2 == 0) {
    return power<kExponent / 2, T>(u * u);
  } else {
    return u * power<kExponent - 1, T>(u);
  }
}

template <int... kDegrees>
struct Degrees {};
using AllDegrees = Degrees<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16>;

// kUpper: whether there may be an upper bound. Where that is only known at run time, what has none pays for one at infinity.
template <typename T, int kDegree, bool kUpper>
struct Activation {
  Vec<T> floor, ceiling;  // 0 and 1, or infinite where the activation has no such bound

  explicit Activation(bool lower, bool upper = kUpper)
      : floor(broadcast(lower ? T(0) : -std::numeric_limits<T>::infinity())),
        ceiling(broadcast(upper ? T(1) : std::numeric_limits<T>::infinity())) {}

  // u = cut(raise(t)), and raise(t) - u is max(t - 1, 0), or 0 without an upper bound
  Vec<T> raise(Vec<T> t) const { return at_least<T>(floor, t); }
  Vec<T> cut(Vec<T> raised) const { return kUpper ? at_most<T>(ceiling, raised) : raised; }

  // phi' / (scale / threshold) from cut(raise(t))
  Vec<T> slope(Vec<T> t, Vec<T> u) const {
    if constexpr (kDegree == 1) {
      return t > floor ? broadcast(T(1)) : Vec<T>{};
    } else {
      return power<kDegree - 1, T>(u);
    }
  }

  // sum + degree / scale * phi: for degree 8 four multiplications and four additions or comparisons
  Vec<T> add_to(Vec<T> sum, Vec<T> t) const {
    const Vec<T> raised = raise(t), u = cut(raised);
    if (kUpper) sum += broadcast(T(kDegree)) * (raised - u);
    if constexpr (kDegree == 1) {
      return sum + u;
    } else {
      return sum + power<kDegree / 2, T>(u) * power<kDegree - kDegree / 2, T>(u);
    }
  }

  // phi' / (scale / threshold) * factor
  Vec<T> slope_times(Vec<T> t, Vec<T> factor) const { return slope(t, cut(raise(t))) * factor; }
};

}  // namespace
}  // namespace mixfeat
