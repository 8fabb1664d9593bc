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

// A constant, because at -O0 a call of infinity() is a function of external linkage. The same holds for std::min and
// std::max.
template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Vectors have kBytes: kVectorBytes, or fewer where what is left does not fill one.
template <typename T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
  typedef T unaligned __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias));
};
template <typename T, int kBytes = kVectorBytes>
using Vec = typename VectorOf<T, kBytes>::type;

template <int kBytes = kVectorBytes, typename T>
inline Vec<T, kBytes> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T, kBytes>::unaligned*>(p);
}

template <int kBytes = kVectorBytes, typename T>
inline void store(T* p, Vec<T, kBytes> v) {
  *reinterpret_cast<typename VectorOf<T, kBytes>::unaligned*>(p) = v;
}

template <int kBytes = kVectorBytes, typename T>
inline Vec<T, kBytes> broadcast(T x) {
  return x - Vec<T, kBytes>{};  // x - 0 is x for every x, and one broadcast
}

// The larger or smaller of a value and a bound; a NaN value stays. x86 has this very function in one instruction, which
// compilers do not always find.
template <typename T, int kBytes = kVectorBytes>
inline Vec<T, kBytes> clamp_min(Vec<T, kBytes> v, Vec<T, kBytes> bound) {
#if defined(__AVX512F__)
  if constexpr (kBytes == 64 && sizeof(T) == 4) return _mm512_max_ps(bound, v);
  if constexpr (kBytes == 64 && sizeof(T) == 8) return _mm512_max_pd(bound, v);
#endif
#if defined(__AVX__)
  if constexpr (kBytes == 32 && sizeof(T) == 4) return _mm256_max_ps(bound, v);
  if constexpr (kBytes == 32 && sizeof(T) == 8) return _mm256_max_pd(bound, v);
#endif
  return bound > v ? bound : v;
}

template <typename T, int kBytes = kVectorBytes>
inline Vec<T, kBytes> clamp_max(Vec<T, kBytes> v, Vec<T, kBytes> bound) {
#if defined(__AVX512F__)
  if constexpr (kBytes == 64 && sizeof(T) == 4) return _mm512_min_ps(bound, v);
  if constexpr (kBytes == 64 && sizeof(T) == 8) return _mm512_min_pd(bound, v);
#endif
#if defined(__AVX__)
  if constexpr (kBytes == 32 && sizeof(T) == 4) return _mm256_min_ps(bound, v);
  if constexpr (kBytes == 32 && sizeof(T) == 8) return _mm256_min_pd(bound, v);
#endif
  return bound < v ? bound : v;
}

}  // namespace
}  // namespace mixfeat
