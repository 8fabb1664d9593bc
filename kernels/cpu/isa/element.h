// Loads and stores that convert between the elements of a tensor and vectors of float or double.
#pragma once

#include <string.h>

#include <type_traits>

#include "simd.h"

namespace mixfeat {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// As many integers of a type as a vector of T has lanes.
template <typename I, typename T>
struct IntegersOf {
  typedef I type __attribute__((vector_size(sizeof(I) * kLanes<T>)));
  typedef I unaligned __attribute__((vector_size(sizeof(I) * kLanes<T>), aligned(1), may_alias));
};
template <typename I, typename T>
using Integers = typename IntegersOf<I, T>::type;
using Bits = Integers<uint32_t, float>;

template <typename I, typename T>
inline Integers<I, T> load_integers(const void* p) {
  return *static_cast<const typename IntegersOf<I, T>::unaligned*>(p);
}

inline Bits load_bits(const void* p) { return __builtin_convertvector((load_integers<uint16_t, float>(p)), Bits); }

inline void store_bits(void* p, Bits bits) {
  *static_cast<IntegersOf<uint16_t, float>::unaligned*>(p) = __builtin_convertvector(bits, Integers<uint16_t, float>);
}

template <typename T>
inline Vec<T> load_as(const T* p) {
  return load(p);
}

template <typename T>
inline Vec<T> load_as(const uint8_t* p) {
  return __builtin_convertvector((load_integers<uint8_t, T>(p)), Vec<T>);
}

template <typename T>
inline Vec<float> load_as(const BFloat16* p) {
  return (Vec<float>)(load_bits(p) << 16);
}

// A half's exponent and mantissa, moved up, are its value times 2^-112, subnormal numbers included.
template <typename T>
inline Vec<float> load_as(const Half* p) {
  const Bits bits = load_bits(p), magnitude = (bits & 0x7fff) << 13;
  const Vec<float> finite = (Vec<float>)magnitude * broadcast(0x1p112f);
  const Vec<float> value = magnitude >= 0x0f800000u ? (Vec<float>)(magnitude | 0x7f800000u) : finite;
  return (Vec<float>)((Bits)value | (bits & 0x8000) << 16);
}

template <typename T>
inline void store_as(T* p, Vec<T> v) {
  store(p, v);
}

// Both round to nearest, ties to even.
inline void store_as(BFloat16* p, Vec<float> v) {
  const Bits bits = (Bits)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  store_bits(p, v == v ? rounded : Bits{} + 0x7fc0);
}

inline void store_as(Half* p, Vec<float> v) {
  const Bits sign = (Bits)v & 0x80000000u, magnitude = (Bits)v ^ sign;
  const Bits normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  // adding 1/2 leaves a subnormal half's mantissa in the lowest bits, rounded by the addition
  const Bits subnormal = (Bits)((Vec<float>)magnitude + broadcast(0.5f)) - 0x3f000000u;
  Bits bits = magnitude < 0x38800000u ? subnormal : normal;
  bits = magnitude >= 0x477ff000u ? Bits{} + 0x7c00 : bits;  // what would round to 2^16, and infinity
  bits = magnitude > 0x7f800000u ? Bits{} + 0x7e00 : bits;
  store_bits(p, bits | sign >> 16);
}

// Whether a lane is one of the first `count`.
template <typename T>
inline auto first_lanes(int64_t count) {
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  Integers<Lane, T> lane{};
  for (int k = 0; k < kLanes<T>; ++k) lane[k] = k;
  return lane < Lane(count);
}

// The first `count` elements, or a whole vector of them if count is larger; `rest` fills the other lanes.
template <typename T, typename E>
inline Vec<T> load_first(const E* p, int64_t count, T rest) {
  if (count >= kLanes<T>) return load_as<T>(p);
  E padded[kLanes<T>] = {};
  memcpy(padded, p, count * sizeof(E));
  return first_lanes<T>(count) ? load_as<T>(padded) : broadcast(rest);
}

template <typename T, typename E>
inline void store_first(E* p, int64_t count, Vec<T> v) {
  if (count >= kLanes<T>) return store_as(p, v);
  E padded[kLanes<T>];
  store_as(padded, v);
  memcpy(p, padded, count * sizeof(E));
}

}  // namespace
}  // namespace mixfeat
