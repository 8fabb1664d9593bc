// Sums of the lanes of many vectors at once.
#pragma once

#include <utility>

#include "simd.h"

namespace mixfeat {
namespace {

template <typename T, int kBytes = kVectorBytes>
using LaneIndices = std::make_integer_sequence<int, kBytes / sizeof(T)>;

// In each 2 * kBlock lanes: sums of neighbouring blocks of a, then those of b.
template <int kBlock, typename V, int... kIndices>
inline V fold(V a, V b, std::integer_sequence<int, kIndices...>) {
  constexpr int n = sizeof...(kIndices);
  return __builtin_shufflevector(a, b, (kIndices % (2 * kBlock) < kBlock ? kIndices : kIndices - kBlock + n)...) +
         __builtin_shufflevector(a, b, (kIndices % (2 * kBlock) < kBlock ? kIndices + kBlock : kIndices + n)...);
}

// The vector whose lane k is the sum of the lanes of v[k].
template <typename T, int kBytes = kVectorBytes, int kBlock = 1>
inline Vec<T, kBytes> sum_each(Vec<T, kBytes>* v) {
  constexpr int lanes = kBytes / sizeof(T);
  if constexpr (kBlock == lanes) {
    return v[0];
  } else {
#pragma GCC unroll 8
    for (int k = 0; k < lanes / kBlock / 2; ++k) {
      v[k] = fold<kBlock>(v[2 * k], v[2 * k + 1], LaneIndices<T, kBytes>());
    }
    return sum_each<T, kBytes, 2 * kBlock>(v);
  }
}

template <typename V, int... kIndices>
inline auto sum_halves(V v, std::integer_sequence<int, kIndices...>) {
  return __builtin_shufflevector(v, v, kIndices...) +
         __builtin_shufflevector(v, v, (kIndices + sizeof...(kIndices))...);
}

// The sum of a vector's lanes, by halves.
template <typename T, int kBytes = kVectorBytes>
inline T sum_of_lanes(Vec<T, kBytes> v) {
  if constexpr (kBytes == 2 * sizeof(T)) {
    return v[0] + v[1];
  } else {
    return sum_of_lanes<T, kBytes / 2>(sum_halves(v, LaneIndices<T, kBytes / 2>()));
  }
}

template <typename V, int... kIndices>
inline auto concatenate(V a, V b, std::integer_sequence<int, kIndices...>) {
  return __builtin_shufflevector(a, b, kIndices...);
}

}  // namespace
}  // namespace mixfeat
