// Matrix products on blocks that are already in cache: C = A B or C += A B.
//
// A and B hold factors: a float or double each, or a pair of bfloat16 that are two successive terms of the sum. `depth`
// counts factors, and so do the strides of A and B.
//
// A(i, k) = a[i * a_row + k * a_col] is broadcast, so either of its strides may be 1 (A or its transpose in memory);
// rows of B and C are contiguous. n is rounded up to whole vectors and m to a multiple of kRowGroup: B and C must have
// that many columns, A and C that many rows; what stands in the padding is never mixed with the rest.
#pragma once

#include <string.h>

#include "element.h"

namespace mixfeat {
namespace {

constexpr int kRowGroup = 4;
// A register tile: 12 x 2 accumulators of 32 registers, 6 x 2 of 16; what is left of m goes by a third of that.
constexpr int kTileVectors = 2;
constexpr int kTileRows = kRegisters == 32 ? 12 : 6;
constexpr int kRestRows = kTileRows / 3;

template <typename T>
constexpr int64_t kPanel = kTileVectors * kLanes<T>;  // columns of a register tile

struct Pair {
  BFloat16 terms[2];
};

}  // namespace

template <>
struct ComputeOf<Pair> {
  using type = float;
};

namespace {

template <typename T>
inline Vec<T> load_factors(const T* p) {
  return load(p);
}
inline Bits load_factors(const Pair* p) { return load_integers<uint32_t, float>(p); }

template <typename T>
inline Vec<T> broadcast_factor(const T* p) {
  return broadcast(*p);
}
inline Bits broadcast_factor(const Pair* p) {
  uint32_t bits;
  memcpy(&bits, p, sizeof(bits));
  return bits - Bits{};
}

template <typename V>
inline V multiply_add(V x, V y, V sum) {
  return sum + x * y;
}
#if defined(__AVX512BF16__)
inline Vec<float> multiply_add(Bits x, Bits y, Vec<float> sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
}
#endif

template <typename F, int kRows, int kVectors, typename T = Compute<F>>
void gemm_tile(int64_t depth, const F* a, int64_t a_row, int64_t a_col, const F* b, int64_t ldb, T* c, int64_t ldc,
               bool accumulate) {
  Vec<T> acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      acc[i][j] = accumulate ? load(c + i * ldc + j * kLanes<T>) : Vec<T>{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    decltype(load_factors(b)) row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) row[j] = load_factors(b + k * ldb + j * kLanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto x = broadcast_factor(a + i * a_row + k * a_col);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] = multiply_add(x, row[j], acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(c + i * ldc + j * kLanes<T>, acc[i][j]);
  }
}

// All m rows of one panel of kVectors vectors.
template <typename F, int kVectors, typename T = Compute<F>>
void gemm_panel(int64_t m, int64_t depth, const F* a, int64_t a_row, int64_t a_col, const F* b, int64_t ldb, T* c,
                int64_t ldc, bool accumulate) {
  int64_t i = 0;
  for (; i + kTileRows <= m; i += kTileRows) {
    gemm_tile<F, kTileRows, kVectors>(depth, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, accumulate);
  }
  for (; i < m; i += kRestRows) {
    gemm_tile<F, kRestRows, kVectors>(depth, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, accumulate);
  }
}

// One panel of n <= kPanel columns.
template <typename F, typename T = Compute<F>>
void gemm_panel(int64_t m, int64_t n, int64_t depth, const F* a, int64_t a_row, int64_t a_col, const F* b, int64_t ldb,
                T* c, int64_t ldc, bool accumulate) {
  if (n > kLanes<T>) {
    gemm_panel<F, 2>(m, depth, a, a_row, a_col, b, ldb, c, ldc, accumulate);
  } else {
    gemm_panel<F, 1>(m, depth, a, a_row, a_col, b, ldb, c, ldc, accumulate);
  }
}

}  // namespace
}  // namespace mixfeat
