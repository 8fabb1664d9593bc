// Vectors of the instruction set that this translation unit is compiled for, on the compilers' vector extension.
#pragma once

#include <cstdint>
#include <limits>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace mixfeat {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
#endif

template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);

// A constant, because at -O0 a call of infinity() is a function of external linkage. The same holds for std::min and std::max.
template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
template <typename T>
using Vec = typename VectorOf<T>::type;

template <typename T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}

template <typename T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}

template <typename T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0 is x for every x, and one broadcast
}

// The larger or smaller of a value and a bound; a NaN value stays. x86 has this very function in one instruction, which
// compilers do not always find.
template <typename T>
inline Vec<T> clamp_min(Vec<T> v, Vec<T> bound) {
  return bound > v ? bound : v;
}

template <typename T>
inline Vec<T> clamp_max(Vec<T> v, Vec<T> bound) {
  return bound < v ? bound : v;
}

#if defined(__AVX__)
#if defined(__AVX512F__)
#define MIXFEAT_INTRINSIC(name) _mm512_##name
#else
#define MIXFEAT_INTRINSIC(name) _mm256_##name
#endif
template <>
inline Vec<float> clamp_min<float>(Vec<float> v, Vec<float> bound) {
  return MIXFEAT_INTRINSIC(max_ps)(bound, v);
}
template <>
inline Vec<double> clamp_min<double>(Vec<double> v, Vec<double> bound) {
  return MIXFEAT_INTRINSIC(max_pd)(bound, v);
}
template <>
inline Vec<float> clamp_max<float>(Vec<float> v, Vec<float> bound) {
  return MIXFEAT_INTRINSIC(min_ps)(bound, v);
}
template <>
inline Vec<double> clamp_max<double>(Vec<double> v, Vec<double> bound) {
  return MIXFEAT_INTRINSIC(min_pd)(bound, v);
}
#undef MIXFEAT_INTRINSIC
#endif

}  // namespace
}  // namespace mixfeat
