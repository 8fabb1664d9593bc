// The activation family of kernels/polynomial.py, on vectors of t = z / threshold:
//   phi  / scale              = u^degree / degree + max(t - 1, 0) [if upper],   u = t, clamped to >= 0 if lower, to <= 1 if upper
//   phi' / (scale / threshold) = u^(degree - 1), the step [t > 0] for degree 1 with lower
#pragma once

#include <type_traits>
#include <utility>

#include "../kernels.h"
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

// kUpper: whether there may be an upper bound. A kernel that learns this at run time passes `upper`, and pays for a bound of
// infinity where there is none.
template <typename T, int kDegree, bool kUpper>
struct Activation {
  Vec<T> min, max;  // 0 and 1, or infinite where the activation has no such bound

  explicit Activation(bool lower, bool upper = kUpper)
      : min(broadcast(lower ? T(0) : -kInfinity<T>)), max(broadcast(upper ? T(1) : kInfinity<T>)) {}

  // u = clamp_max(clamp_min(t)), and clamp_min(t) - u is max(t - 1, 0), or 0 without an upper bound
  Vec<T> clamp_min(Vec<T> t) const { return mixfeat::clamp_min<T>(t, min); }
  Vec<T> clamp_max(Vec<T> t) const { return kUpper ? mixfeat::clamp_max<T>(t, max) : t; }

  // phi' / (scale / threshold) from t and u
  Vec<T> slope(Vec<T> t, Vec<T> u) const {
    if constexpr (kDegree == 1) {
      return t > min ? broadcast(T(1)) : Vec<T>{};
    } else {
      return power<kDegree - 1, T>(u);
    }
  }

  // sum + degree / scale * phi: for degree 8 four multiplications and four additions or comparisons
  Vec<T> add_to(Vec<T> sum, Vec<T> t) const {
    const Vec<T> clamped = clamp_min(t), u = clamp_max(clamped);
    if (kUpper) sum += broadcast(T(kDegree)) * (clamped - u);
    if constexpr (kDegree == 1) {
      return sum + u;
    } else {
      return sum + power<kDegree / 2, T>(u) * power<kDegree - kDegree / 2, T>(u);
    }
  }

  // phi' / (scale / threshold) * factor
  Vec<T> slope_times(Vec<T> t, Vec<T> factor) const { return slope(t, clamp_max(clamp_min(t))) * factor; }
};

// Returns f(degree, upper) for the degree and the upper bound of `p`, passed as std::integral_constant: f returns the instance of
// a function template.
template <typename F, int... kIndices>
auto instance(const Polynomial& p, F f, std::integer_sequence<int, kIndices...>) {
  using Function = decltype(f(std::integral_constant<int, 1>(), std::false_type()));
  constexpr Function table[][2] = {{f(std::integral_constant<int, kIndices + 1>(), std::false_type()),
                                    f(std::integral_constant<int, kIndices + 1>(), std::true_type())}...};
  return table[p.degree - 1][p.upper];
}

template <typename F>
auto instance(const Polynomial& p, F f) {
  return instance(p, f, std::make_integer_sequence<int, kMaxDegree>());
}

}  // namespace
}  // namespace mixfeat
