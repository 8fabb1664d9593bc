// The activation family of mixfeat.activations.Polynomial, on vectors of t = z / threshold:
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

template <typename T, int kDegree, bool kUpper>
struct Activation {
  Vec<T> floor;  // 0, or -infinity where the activation has no lower bound

  explicit Activation(bool lower) : floor(broadcast(lower ? T(0) : -std::numeric_limits<T>::infinity())) {}

  Vec<T> clamp(Vec<T> t) const {
    const Vec<T> u = at_least<T>(floor, t);
    return kUpper ? at_most<T>(broadcast(T(1)), u) : u;
  }

  // max(t - 1, 0): t - u is t - 1 above the upper bound, and not positive below it
  Vec<T> excess(Vec<T> t, Vec<T> u) const { return at_least<T>(Vec<T>{}, t - u); }

  Vec<T> slope(Vec<T> t, Vec<T> u) const {
    if constexpr (kDegree == 1) {
      return t > floor ? broadcast(T(1)) : Vec<T>{};
    } else {
      return power<kDegree - 1, T>(u);
    }
  }
};

}  // namespace
}  // namespace mixfeat
