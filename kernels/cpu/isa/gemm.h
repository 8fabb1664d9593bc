// Matrix products on blocks that are already in cache: C = A B or C += A B.
//
// A(i, k) = a[i * a_row + k * a_col] is broadcast, so either of its strides may be 1 (A or its transpose in memory);
// rows of B and C are contiguous. n is rounded up to whole vectors and m to a multiple of kRowGroup: B and C must have that
// many columns, A and C that many rows; what stands in the padding is never mixed with the rest.
#pragma once

#include "simd.h"

namespace mixfeat {
namespace {

constexpr int kRowGroup = 4;
// A register tile: 12 x 2 accumulators of 32 registers, 6 x 2 of 16; what is left of m goes by a third of that.
constexpr int kTileVectors = 2;
constexpr int kTileRows = kRegisters == 32 ? 12 : 6;
constexpr int kRestRows = kTileRows / 3;

template <typename T>
constexpr int64_t kPanel = kTileVectors * kLanes<T>;  // columns of a register tile

template <typename T, int kRows, int kVectors>
void gemm_tile(int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t ldb, T* c, int64_t ldc,
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
    Vec<T> row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + k * ldb + j * kLanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> x = broadcast(a[i * a_row + k * a_col]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] += x * row[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(c + i * ldc + j * kLanes<T>, acc[i][j]);
  }
}

// All m rows of one panel of kVectors vectors.
template <typename T, int kVectors>
void gemm_panel(int64_t m, int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t ldb, T* c, int64_t ldc,
                bool accumulate) {
  int64_t i = 0;
  for (; i + kTileRows <= m; i += kTileRows) {
    gemm_tile<T, kTileRows, kVectors>(depth, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, accumulate);
  }
  for (; i < m; i += kRestRows) {
    gemm_tile<T, kRestRows, kVectors>(depth, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, accumulate);
  }
}

// One panel of n <= kPanel columns.
template <typename T>
void gemm_panel(int64_t m, int64_t n, int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t ldb, T* c,
                int64_t ldc, bool accumulate) {
  if (n > kLanes<T>) {
    gemm_panel<T, 2>(m, depth, a, a_row, a_col, b, ldb, c, ldc, accumulate);
  } else {
    gemm_panel<T, 1>(m, depth, a, a_row, a_col, b, ldb, c, ldc, accumulate);
  }
}

}  // namespace
}  // namespace mixfeat
