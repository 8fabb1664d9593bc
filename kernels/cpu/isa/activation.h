// The activation family of kernels/polynomial.py, on vectors of t = z / threshold:
//   u                          = t, clamped to >= 0 if lower, to <= 1 if upper
//   phi  / scale               = u^degree / degree + max(t - 1, 0) [if upper]
//   phi' / (scale / threshold) = u^(degree - 1), the step [t > 0] for degree 1 with lower
// and with a negative slope, for t <= 0, negative_slope * t and negative_slope.
#pragma once

#include <type_traits>
#include <utility>

#include "../kernels.h"
#include "simd.h"

namespace mixfeat {
namespace {

template <int kExponent, typename V>
inline V power(V u) {
  if constexpr (kExponent == 0) {
    return V{} + 1;
  } else if constexpr (kExponent == 1) {
    return u;
  } else if constexpr (kExponent % 2 == 0) {
    return power<kExponent / 2>(u * u);
  } else {
    return u * power<kExponent - 1>(u);
  }
}

// kUpper: whether there may be an upper bound. A kernel that learns this at run time passes `upper`, and pays for a
// bound of infinity where there is none.
template <typename T, int kDegree, bool kUpper, int kBytes = kVectorBytes>
struct Activation {
  using V = Vec<T, kBytes>;
  V min, max;  // 0 and 1, or infinite where the activation has no such bound

  explicit Activation(const Polynomial& p)
      : min(broadcast<kBytes>(p.lower ? T(0) : -kInfinity<T>)), max(broadcast<kBytes>(p.upper ? T(1) : kInfinity<T>)) {}

  // u = clamp_max(clamp_min(t)), and clamp_min(t) - u is max(t - 1, 0), or 0 without an upper bound
  V clamp_min(V t) const { return mixfeat::clamp_min<T, kBytes>(t, min); }
  V clamp_max(V t) const { return kUpper ? mixfeat::clamp_max<T, kBytes>(t, max) : t; }

  // Adds the two parts of phi / scale to a sum each: u^degree, not yet divided by degree, and the linear part.
  void add_parts(V t, V clamped, V u, V& poly, V& linear) const {
    poly += power<kDegree>(u);
    if (kUpper) linear += clamped - u;
  }

  // phi' / (scale / threshold) from t and u
  V slope(V t, V u) const {
    if constexpr (kDegree == 1) {
      return t > min ? V{} + 1 : V{};
    } else {
      return power<kDegree - 1>(u);
    }
  }

  // sum + degree / scale * phi: for degree 8 four multiplications and four additions or comparisons
  V add_to(V sum, V t) const {
    const V clamped = clamp_min(t), u = clamp_max(clamped);
    if (kUpper) sum += broadcast<kBytes>(T(kDegree)) * (clamped - u);
    if constexpr (kDegree == 1) {
      return sum + u;
    } else {
      return sum + power<kDegree / 2>(u) * power<kDegree - kDegree / 2>(u);
    }
  }

  // phi' / (scale / threshold) * factor
  V slope_times(V t, V factor) const { return slope(t, clamp_max(clamp_min(t))) * factor; }
};

// The activations with a negative slope, of all degrees: slower, but few.
constexpr int kAnyDegree = 0;
template <typename T, bool kUpper, int kBytes>
struct Activation<T, kAnyDegree, kUpper, kBytes> {
  using V = Vec<T, kBytes>;
  V max, degree, negative_slope;
  int exponent;

  explicit Activation(const Polynomial& p)
      : max(broadcast<kBytes>(p.upper ? T(1) : kInfinity<T>)),
        degree(broadcast<kBytes>(T(p.degree))),
        negative_slope(broadcast<kBytes>(T(p.negative_slope))),
        exponent(int(p.degree) - 1) {}

  V clamp_min(V t) const { return mixfeat::clamp_min<T, kBytes>(t, V{}); }
  V clamp_max(V t) const { return mixfeat::clamp_max<T, kBytes>(t, max); }

  V power(V u) const {  // u^exponent
    V result = V{} + 1;
    for (int e = exponent; e; e >>= 1, u *= u) {
      if (e & 1) result *= u;
    }
    return result;
  }

  void add_parts(V t, V clamped, V u, V& poly, V& linear) const {
    poly += u * power(u);
    linear += (clamped - u) + negative_slope * (t - clamped);
  }

  V slope(V t, V u) const { return t <= 0 ? negative_slope : power(u); }

  V add_to(V sum, V t) const {
    const V clamped = clamp_min(t), u = clamp_max(clamped);
    V linear = {};
    add_parts(t, clamped, u, sum, linear);
    return sum + degree * linear;
  }

  V slope_times(V t, V factor) const { return slope(t, clamp_max(clamp_min(t))) * factor; }
};

// Returns f(degree, upper) for the degree and the upper bound of `p`, passed as std::integral_constant: f returns the
// instance of a function template.
template <typename F, int... kIndices>
auto instance(const Polynomial& p, F f, std::integer_sequence<int, kIndices...>) {
  using Function = decltype(f(std::integral_constant<int, 1>(), std::false_type()));
  constexpr Function table[][2] = {{f(std::integral_constant<int, kIndices + 1>(), std::false_type()),
                                    f(std::integral_constant<int, kIndices + 1>(), std::true_type())}...};
  if (p.negative_slope != 0) return f(std::integral_constant<int, kAnyDegree>(), std::true_type());
  return table[p.degree - 1][p.upper];
}

template <typename F>
auto instance(const Polynomial& p, F f) {
  return instance(p, f, std::make_integer_sequence<int, kMaxDegree>());
}

}  // namespace
}  // namespace mixfeat
