// Loads and stores that convert between the elements of a tensor and vectors of float or double.
#pragma once

#include <string.h>

#include <type_traits>

#include "../kernels.h"
#include "simd.h"

namespace mixfeat {
namespace {

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

// x86 widens a whole vector in one instruction, which compilers do not always find: of bytes, GCC takes one at a time.
inline Bits load_bits(const void* p) {
  const auto bits = load_integers<uint16_t, float>(p);
#if defined(__AVX512F__)
  return (Bits)_mm512_cvtepu16_epi32((__m256i)bits);
#elif defined(__AVX2__)
  return (Bits)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, Bits);
#endif
}

inline void store_bits(void* p, Bits bits) {
  *static_cast<IntegersOf<uint16_t, float>::unaligned*>(p) = __builtin_convertvector(bits, Integers<uint16_t, float>);
}

template <typename T>
inline Vec<T> load_as(const T* p) {
  return load(p);
}

template <typename T>
inline Vec<T> load_as(const uint8_t* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)load_integers<uint8_t, T>(p)));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadu_si64(p)));
#endif
  const auto shorts = __builtin_convertvector((load_integers<uint8_t, T>(p)), Integers<int16_t, T>);
  return __builtin_convertvector(__builtin_convertvector(shorts, Integers<int32_t, T>), Vec<T>);
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
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
#else
  const Bits bits = (Bits)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  store_bits(p, v == v ? rounded : Bits{} + 0x7fc0);
#endif
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

template <typename T>
using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// The number of each lane.
template <typename T>
inline Integers<Lane<T>, T> lane_numbers() {
  Integers<Lane<T>, T> lane{};
  for (int k = 0; k < kLanes<T>; ++k) lane[k] = k;
  return lane;
}

// Whether a lane is one of the first `count`.
template <typename T>
inline auto first_lanes(int64_t count) {
  return lane_numbers<T>() < Lane<T>(count);
}

// Copies of the first `count` of as many elements as a vector of T has lanes; a memcpy of a size unknown ahead is a
// call. Masks are of bytes, one instruction for all types.
template <typename T, typename E>
inline void load_padded(E* padded, const E* p, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  constexpr int bytes = kLanes<T> * sizeof(E);
  const uint64_t mask = (uint64_t(1) << count * sizeof(E)) - 1;
  if constexpr (bytes == 64) _mm512_storeu_si512(padded, _mm512_maskz_loadu_epi8(mask, p));
  if constexpr (bytes == 32) _mm256_storeu_si256(reinterpret_cast<__m256i*>(padded), _mm256_maskz_loadu_epi8(mask, p));
  if constexpr (bytes == 16) _mm_storeu_si128(reinterpret_cast<__m128i*>(padded), _mm_maskz_loadu_epi8(mask, p));
  if constexpr (bytes >= 16) return;
#endif
  memset(padded, 0, kLanes<T> * sizeof(E));
  memcpy(padded, p, count * sizeof(E));
}

template <typename T, typename E>
inline void store_padded(E* p, const E* padded, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  constexpr int bytes = kLanes<T> * sizeof(E);
  const uint64_t mask = (uint64_t(1) << count * sizeof(E)) - 1;
  if constexpr (bytes == 64) _mm512_mask_storeu_epi8(p, mask, _mm512_loadu_si512(padded));
  if constexpr (bytes == 32)
    _mm256_mask_storeu_epi8(p, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(padded)));
  if constexpr (bytes == 16) _mm_mask_storeu_epi8(p, mask, _mm_loadu_si128(reinterpret_cast<const __m128i*>(padded)));
  if constexpr (bytes >= 16) return;
#endif
  memcpy(p, padded, count * sizeof(E));
}

// The first `count` elements, or a whole vector of them if count is larger; `rest` fills the other lanes.
template <typename T, typename E>
inline Vec<T> load_first(const E* p, int64_t count, T rest) {
  if (count >= kLanes<T>) return load_as<T>(p);
  E padded[kLanes<T>];
  load_padded<T>(padded, p, count);
  return first_lanes<T>(count) ? load_as<T>(padded) : broadcast(rest);
}

template <typename T, typename E>
inline void store_first(E* p, int64_t count, Vec<T> v) {
  if (count >= kLanes<T>) return store_as(p, v);
  E padded[kLanes<T>];
  store_as(padded, v);
  store_padded<T>(p, padded, count);
}

// One element, without the masks that are slow to write and to read again.
template <typename T, typename E>
inline T load_one(const E* p) {
  const E padded[kLanes<T>] = {*p};
  return load_as<T>(padded)[0];
}

template <typename T, typename E>
inline void store_one(E* p, T value) {
  E padded[kLanes<T>];
  store_as(padded, broadcast(value));
  *p = padded[0];
}

}  // namespace
}  // namespace mixfeat
