// The all-pairs Mixup loss and its gradient, tile by tile.
//
// A tile is as many pairs as a vector has lanes. Its logits are summed over vectors along (patch, filter), whose lanes
// are then summed so that lanes become pairs: softmax and cross-entropy work on all pairs of the tile at once. The
// gradient evaluates the activation again. All tiles of a pair of blocks go through one class before the next, whose
// pre-activations then stay in the first-level cache. Only the logits of the pairs are stored, for one pair of blocks
// at a time.
//
// Vectors of a readout of -1 come before those of 1, at most one has both. Signs are applied to sums of vectors between
// those, not to the vectors.
//
// A vector whose every t, over a pair of blocks, lies where the activation is 0 is left out. Where the activation is
// linear, its sum separates into a row's share and a column's.

#include <math.h>

#include "../kernels.h"
#include "../scratch.h"
#include "activation.h"
#include "exponential.h"
#include "sums.h"

namespace mixfeat::MIXFEAT_ISA {
namespace {

template <typename T>
constexpr int kPairs = kLanes<T>;
template <typename T>
constexpr int kColumns = kPairs<T> >= 8 ? 4 : 2;  // tiles of 4 x 4, 2 x 4, 2 x 2 or 1 x 2 pairs
template <typename T>
constexpr int kRows = kPairs<T> / kColumns<T>;

// Where the last vector of a class is at most half full, half a vector does. Only AVX-512 saves time by that.
constexpr int kHalfBytes = kVectorBytes == 64 ? kVectorBytes / 2 : kVectorBytes;

// Integers in the lanes of a vector.
template <typename T>
using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// Which pairs (i + r, j + k) of a tile are evaluated: those with k < kWidth, and on the diagonal with i + r <= j + k,
// where kOffset = i - j. Elsewhere kOffset is -1. It saves time only: pairs that do not count have a weight of 0.
template <int kOffset, int kWidth>
struct Visited {
  constexpr bool operator()(int r, int k) const { return k < kWidth && (kOffset < 0 || r + kOffset <= k); }
};

// Lane k takes the value of lane k + kDistance.
template <typename T, int kDistance, int... kIndices>
inline Vec<T> rotate(Vec<T> v, std::integer_sequence<int, kIndices...>) {
  return __builtin_shufflevector(v, v, ((kIndices + kDistance) % kLanes<T>)...);
}

template <typename T, int kDistance = kLanes<T> / 2>
inline T max_lane(Vec<T> v) {
  if constexpr (kDistance == 0) {
    return v[0];
  } else {
    return max_lane<T, kDistance / 2>(clamp_min<T>(v, rotate<T, kDistance>(v, LaneIndices<T>())));
  }
}

// The buffers of a pair of blocks. For each class they list the vectors along (patch, filter) by their offsets: the
// active ones, which are evaluated, and the linear ones.
template <typename T>
struct Buffers {
  Scratch scratch;
  T* logits;                             // (tiles, C, pairs of a tile); then D = (softmax - target) * pair weight
  T* combined;                           // (labels, pairs of a tile): a tile's logits, with a readout
  T *row_linear, *column_linear;         // (C, block): sums over the linear vectors
  T *row_d, *column_d;                   // (C, block): sums of D, for classes that have linear vectors
  int32_t *active_count, *linear_count;  // (C,): whole vectors
  int32_t* half;                         // (C,): whether half a vector follows the active ones
  int32_t* negative_count;               // (C,): how many active vectors, the first ones, are negative as a whole
  int32_t *active, *linear;              // (C, vectors)
  // (block, pairs of a row or a column of a tile): targets by lane, -1 for padding
  Lane<T> *row_target, *column_target;

  Buffers(const PairwiseMixup<T>& a, void* memory)
      : scratch(memory),
        logits(scratch.take<T>(a.classes * a.block * a.block)),
        combined(scratch.take<T>(a.readout ? a.labels * kPairs<T> : 0)),
        row_linear(scratch.take<T>(a.classes * a.block)),
        column_linear(scratch.take<T>(a.classes * a.block)),
        row_d(scratch.take<T>(a.classes * a.block)),
        column_d(scratch.take<T>(a.classes * a.block)),
        active_count(scratch.take<int32_t>(a.classes)),
        linear_count(scratch.take<int32_t>(a.classes)),
        half(scratch.take<int32_t>(a.classes)),
        negative_count(scratch.take<int32_t>(a.classes)),
        active(scratch.take<int32_t>(a.classes * (a.padded_length / kLanes<T>))),
        linear(scratch.take<int32_t>(a.classes * (a.padded_length / kLanes<T>))),
        row_target(scratch.take<Lane<T>>(a.block * kColumns<T>)),
        column_target(scratch.take<Lane<T>>(a.block * kRows<T>)) {}
};

template <typename T>
int64_t scratch_bytes(const PairwiseMixup<T>& a) {
  return Buffers<T>(a, nullptr).scratch.bytes();
}

// The active vectors of a class, in order of their signs: the vectors before ends[0] have signs[0], and so on.
template <typename T>
struct Signs {
  int count = 0;  // of changes of sign
  const int32_t* ends[3];
  Vec<T> signs[3];

  void add(const int32_t* end, Vec<T> sign) {
    ends[count] = end;
    signs[count++] = sign;
  }
};

template <typename T, int kDegree>
struct BlockPair {
  template <int kBytes>
  using Phi = Activation<T, kDegree, true, kBytes>;

  const PairwiseMixup<T>& a;
  const Buffers<T> buffers;
  const int64_t row_begin, row_end, column_begin, column_end;  // in whole groups
  const bool upper_triangle;

  BlockPair(const PairwiseMixup<T>& a, int64_t row_block, int64_t column_block, bool upper_triangle, void* memory)
      : a(a),
        buffers(a, memory),
        row_begin(row_block * a.block),
        row_end(end(a.row, row_begin)),
        column_begin(column_block * a.block),
        column_end(end(a.column, column_begin)),
        upper_triangle(upper_triangle) {
    list_vectors(row_block, column_block);
    for (int64_t n = row_begin; n < row_end; ++n) {
      const Lane<T> target = n < a.row.samples ? Lane<T>(a.row.target[n]) : -1;
      for (int k = 0; k < kColumns<T>; ++k) buffers.row_target[(n - row_begin) * kColumns<T> + k] = target;
    }
    for (int64_t m = column_begin; m < column_end; ++m) {
      const Lane<T> target = m < a.column.samples ? Lane<T>(a.column.target[m]) : -1;
      const int64_t in_tile = (m - column_begin) % kColumns<T>, tile = m - column_begin - in_tile;
      for (int r = 0; r < kRows<T>; ++r) buffers.column_target[tile * kRows<T> + r * kColumns<T> + in_tile] = target;
    }
  }

  int64_t end(const MixupSide<T>& side, int64_t begin) const {
    return min(begin + a.block, round_up(side.samples, kSampleGroup));
  }

  int64_t offset(int64_t n, int64_t c) const { return (n * a.classes + c) * a.padded_length; }
  int64_t vectors() const { return a.padded_length / kLanes<T>; }
  int64_t negative(int64_t c) const { return a.negative ? a.negative[c] : 0; }
  int sign(int64_t c, int64_t f) const { return f < negative(c) ? -1 : 1; }  // of a vector that is not mixed
  bool is_mixed(int64_t c, int64_t f) const { return f < negative(c) && negative(c) < min(f + kLanes<T>, a.length); }

  Signs<T> signs(int64_t c) const {
    Signs<T> result;
    const int32_t *begin = buffers.active + c * vectors(), *end = begin + buffers.active_count[c];
    const int32_t* first = begin + buffers.negative_count[c];
    const Vec<T> one = Vec<T>{} + 1;
    if (first > begin) result.add(first, -one);
    if (first < end && is_mixed(c, *first)) {
      Vec<T> sign;
      for (int k = 0; k < kLanes<T>; ++k) sign[k] = *first + k < negative(c) ? T(-1) : T(1);
      result.add(++first, sign);
    }
    result.add(end, one);
    return result;
  }

  // Sorts the vectors of each class into zero for all pairs of the blocks (left out), linear for all, and active.
  void list_vectors(int64_t row_block, int64_t column_block) {
    const Polynomial& phi = a.activation;
    const T lower = phi.lower ? T(0) : -kInfinity<T>, zero_max = phi.negative_slope == 0 ? lower : -kInfinity<T>;
    // at a corner the slope is the left one
    const T linear_above = phi.degree == 1 ? lower : phi.upper ? T(1) : kInfinity<T>;
    for (int64_t c = 0; c < a.classes; ++c) {
      const T* row = a.row.bounds + (row_block * a.classes + c) * 2 * a.padded_length;
      const T* column = a.column.bounds + (column_block * a.classes + c) * 2 * a.padded_length;
      int32_t active = 0, linear = 0, negative_count = 0;
      for (int64_t f = 0; f < a.padded_length; f += kLanes<T>) {
        if (a.skip) {
          if (max_lane<T>(load(row + a.padded_length + f) + load(column + a.padded_length + f)) <= zero_max) continue;
          if (!is_mixed(c, f) && -max_lane<T>(-(load(row + f) + load(column + f))) > linear_above) {
            buffers.linear[c * vectors() + linear++] = int32_t(f);
            continue;
          }
        }
        negative_count += !is_mixed(c, f) && f < negative(c);
        buffers.active[c * vectors() + active++] = int32_t(f);
      }
      const int64_t last = a.padded_length - kLanes<T>;
      const bool half = kHalfBytes < kVectorBytes && a.length - last <= kLanes<T> / 2 && negative(c) <= last;
      buffers.half[c] = half && active && buffers.active[c * vectors() + active - 1] == last;
      buffers.active_count[c] = active - buffers.half[c];
      buffers.negative_count[c] = negative_count;
      buffers.linear_count[c] = linear;
      if (linear) sum_linear(c);
    }
  }

  // Where phi is linear, degree / scale * phi(t) = degree * t + 1 - degree, and t is the sum of a row's share and a
  // column's.
  void sum_linear(int64_t c) {
    const T degree = T(a.activation.degree), scale = T(a.activation.scale / a.activation.degree);
    const int32_t* linear = buffers.linear + c * vectors();
    int64_t lanes = 0;
    for (int32_t k = 0; k < buffers.linear_count[c]; ++k)
      lanes += sign(c, linear[k]) * min(kLanes<T>, a.length - linear[k]);
    auto sum = [&](const T* t, T constant) {
      Vec<T> total = {};
      for (int32_t k = 0; k < buffers.linear_count[c]; ++k)
        total += broadcast(T(sign(c, linear[k]))) * load(t + linear[k]);
      T result = 0;
      for (int k = 0; k < kLanes<T>; ++k) result += total[k];
      return scale * (degree * result + constant);
    };
    for (int64_t i = row_begin; i < row_end; ++i) {
      buffers.row_linear[c * a.block + i - row_begin] = sum(a.row.t + offset(i, c), (1 - degree) * T(lanes));
    }
    for (int64_t j = column_begin; j < column_end; ++j) {
      buffers.column_linear[c * a.block + j - column_begin] = sum(a.column.t + offset(j, c), 0);
    }
    for (int64_t k = 0; k < a.block; ++k) buffers.row_d[c * a.block + k] = buffers.column_d[c * a.block + k] = 0;
  }

  // Calls f(which of its pairs are visited, logits, first row, first column) for each tile.
  template <typename F>
  void for_each_tile(const F& f) const {
    T* logits = buffers.logits;
    for (int64_t i = row_begin; i < row_end; i += kRows<T>) {
      const int64_t first = upper_triangle ? i / kColumns<T> * kColumns<T> : column_begin;
      for (int64_t j = first; j < column_end; j += kColumns<T>, logits += a.classes * kPairs<T>) {
        call(f, logits, i, j);
      }
    }
  }

  // Each kind of tile is code of its own, for every degree: so double has one kind, and the diagonal no narrow ones.
  template <typename F>
  void call(const F& f, T* logits, int64_t i, int64_t j) const {
    if constexpr (sizeof(T) == 4) {
      if (upper_triangle && i == j) return f(Visited<0, kColumns<T>>(), logits, i, j);
      if constexpr (kRows<T> < kColumns<T>) {
        if (upper_triangle && i > j) return f(Visited<kRows<T>, kColumns<T>>(), logits, i, j);
      }
      if (2 * (a.column.samples - j) <= kColumns<T>) {  // half of the columns are padding
        return f(Visited<-1, kColumns<T> / 2>(), logits, i, j);
      }
    }
    f(Visited<-1, kColumns<T>>(), logits, i, j);
  }

  // sums[r, k] += degree / scale * phi(x_r + y_k) for a vector of each sample
  template <int kBytes, typename Pairs>
  static void add_phi(const Phi<kBytes>& phi, Pairs visited, const T* x, const T* y, int64_t stride,
                      Vec<T, kBytes>* sums) {
    constexpr int rows = kRows<T>, columns = kColumns<T>;
    Vec<T, kBytes> second[columns];
#pragma GCC unroll 4
    for (int k = 0; k < columns; ++k) second[k] = load<kBytes>(y + k * stride);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const Vec<T, kBytes> first = load<kBytes>(x + r * stride);
#pragma GCC unroll 4
      for (int k = 0; k < columns; ++k) {
        if (visited(r, k)) sums[r * columns + k] = phi.add_to(sums[r * columns + k], first + second[k]);
      }
    }
  }

  void logits(int64_t c) const {
    const int64_t stride = a.classes * a.padded_length;
    const int32_t *begin = buffers.active + c * vectors(), *end = begin + buffers.active_count[c];
    const Signs<T> signs = this->signs(c);
    const Vec<T> scale = broadcast(T(a.activation.scale / a.activation.degree));
    const bool linear = buffers.linear_count[c];
    const Phi<kVectorBytes> phi(a.activation);
    for_each_tile([&](auto visited, T* logits, int64_t i, int64_t j) {
      const T *x = a.row.t + offset(i, c), *y = a.column.t + offset(j, c);
      T* out = logits + c * kPairs<T>;
      Vec<T> sums[kPairs<T>] = {};
      const int32_t* active = begin;
      for (int s = 0;; ++s) {
        for (; active < signs.ends[s]; ++active)
          add_phi<kVectorBytes>(phi, visited, x + *active, y + *active, stride, sums);
        if (s + 1 == signs.count) break;
        const Vec<T> change = signs.signs[s] * signs.signs[s + 1];
#pragma GCC unroll 16
        for (int k = 0; k < kPairs<T>; ++k) sums[k] *= change;
      }
      if constexpr (kHalfBytes < kVectorBytes) {
        Vec<T, kHalfBytes> halves[kPairs<T>];
#pragma GCC unroll 16
        for (int k = 0; k < kPairs<T>; ++k) halves[k] = sum_halves(sums[k], LaneIndices<T, kHalfBytes>());
        if (buffers.half[c]) {
          const Phi<kHalfBytes> half_phi(a.activation);
          add_phi<kHalfBytes>(half_phi, visited, x + *end, y + *end, stride, halves);
        }
        const auto low = sum_each<T, kHalfBytes>(halves), high = sum_each<T, kHalfBytes>(halves + kPairs<T> / 2);
        store(out, concatenate(low, high, LaneIndices<T>()) * scale);
      } else {
        store(out, sum_each<T>(sums) * scale);
      }
      if (linear) {
        for (int k = 0; k < kPairs<T>; ++k) {
          out[k] += buffers.row_linear[c * a.block + i - row_begin + k / kColumns<T>] +
                    buffers.column_linear[c * a.block + j - column_begin + k % kColumns<T>];
        }
      }
    });
  }

  // Adds the gradient of a tile, given its D, to a vector of each sample.
  template <int kBytes, typename Pairs>
  void add_gradient(const Phi<kBytes>& phi, Pairs visited, Vec<T, kBytes> sign, const T* d, const T* x, const T* y,
                    T* dx, T* dy) const {
    constexpr int rows = kRows<T>, columns = kColumns<T>;
    const int64_t stride = a.classes * a.padded_length;
    const Vec<T, kBytes> row_weight = broadcast<kBytes>(T(a.row.weight)) * sign;
    const Vec<T, kBytes> column_weight = broadcast<kBytes>(T(a.column.weight)) * sign;
    Vec<T, kBytes> second[columns], by_column[columns] = {};
#pragma GCC unroll 4
    for (int k = 0; k < columns; ++k) second[k] = load<kBytes>(y + k * stride);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const Vec<T, kBytes> first = load<kBytes>(x + r * stride);
      Vec<T, kBytes> by_row = {};
#pragma GCC unroll 4
      for (int k = 0; k < columns; ++k) {
        if (!visited(r, k)) continue;
        const Vec<T, kBytes> e = phi.slope_times(first + second[k], broadcast<kBytes>(d[r * columns + k]));
        by_row += e;
        by_column[k] += e;
      }
      store<kBytes>(dx + r * stride, load<kBytes>(dx + r * stride) + row_weight * by_row);
    }
#pragma GCC unroll 4
    for (int k = 0; k < columns; ++k) {  // after the rows: i and j may be the same samples
      store<kBytes>(dy + k * stride, load<kBytes>(dy + k * stride) + column_weight * by_column[k]);
    }
  }

  void gradient(int64_t c) const {
    const int32_t *begin = buffers.active + c * vectors(), *end = begin + buffers.active_count[c];
    const bool linear = buffers.linear_count[c];
    const Signs<T> signs = this->signs(c);
    const Phi<kVectorBytes> phi(a.activation);
    for_each_tile([&](auto visited, const T* logits, int64_t i, int64_t j) {
      const T *x = a.row.t + offset(i, c), *y = a.column.t + offset(j, c), *d = logits + c * kPairs<T>;
      T *dx = a.row.grad + offset(i, c), *dy = a.column.grad + offset(j, c);
      const int32_t* active = begin;
      for (int s = 0; s < signs.count; ++s) {
        for (; active < signs.ends[s]; ++active) {
          const int64_t f = *active;
          add_gradient<kVectorBytes>(phi, visited, signs.signs[s], d, x + f, y + f, dx + f, dy + f);
        }
      }
      if constexpr (kHalfBytes < kVectorBytes) {
        if (buffers.half[c]) {
          const Phi<kHalfBytes> half_phi(a.activation);
          add_gradient<kHalfBytes>(half_phi, visited, Vec<T, kHalfBytes>{} + 1, d, x + *end, y + *end, dx + *end,
                                   dy + *end);
        }
      }
      if (linear) {
        for (int k = 0; k < kPairs<T>; ++k) {
          buffers.row_d[c * a.block + i - row_begin + k / kColumns<T>] += d[k];
          buffers.column_d[c * a.block + j - column_begin + k % kColumns<T>] += d[k];
        }
      }
    });
    if (linear) linear_gradient(c);
  }

  // Where phi is linear, phi' = scale / threshold: each such vector gets the sum of D over a sample's pairs.
  void linear_gradient(int64_t c) const {
    const int32_t *begin = buffers.linear + c * vectors(), *end = begin + buffers.linear_count[c];
    auto add = [&](T* grad, double weight, T d) {
      for (const int32_t* linear = begin; linear < end; ++linear) {
        store(grad + *linear, load(grad + *linear) + broadcast(T(sign(c, *linear) * weight) * d));
      }
    };
    for (int64_t i = row_begin; i < row_end; ++i) {
      add(a.row.grad + offset(i, c), a.row.weight, buffers.row_d[c * a.block + i - row_begin]);
    }
    for (int64_t j = column_begin; j < column_end; ++j) {
      add(a.column.grad + offset(j, c), a.column.weight, buffers.column_d[c * a.block + j - column_begin]);
    }
  }

  // How often each pair of a tile counts: not at all for padding and below the diagonal, twice above the diagonal; and
  // not at all for a sample with itself, or for two of one class, where such pairs are left out.
  Vec<Lane<T>> counts(Vec<Lane<T>> row_target, Vec<Lane<T>> column_target, int64_t i, int64_t j) const {
    Vec<Lane<T>> count = Vec<Lane<T>>{} + (upper_triangle ? 2 : 1);
    if (upper_triangle && i + kRows<T> > j) {
      for (int k = 0; k < kPairs<T>; ++k) {
        const int64_t n = i + k / kColumns<T>, m = j + k % kColumns<T>;
        count[k] = n > m ? 0 : n == m ? 1 : 2;
      }
    }
    if (a.distinct && i < j + kColumns<T> && j < i + kRows<T>) {
      for (int k = 0; k < kPairs<T>; ++k) count[k] = i + k / kColumns<T> == j + k % kColumns<T> ? 0 : count[k];
    }
    if (a.different_class) count = row_target == column_target ? Vec<Lane<T>>{} : count;
    return (row_target < 0) | (column_target < 0) ? Vec<Lane<T>>{} : count;
  }

  // Replaces the logits of a tile by D and returns the tile's share of the loss.
  double cross_entropy(T* logits, int64_t i, int64_t j) const {
    if (!a.readout) return cross_entropy_of(logits, i, j);
    constexpr int pairs = kPairs<T>;
    const int64_t filters = a.classes / a.labels;
    for (int64_t c = 0; c < a.labels; ++c) {
      Vec<T> sum = {};
      for (int64_t f = c * filters; f < (c + 1) * filters; ++f)
        sum += broadcast(a.readout[f]) * load(logits + f * pairs);
      store(buffers.combined + c * pairs, sum);
    }
    const double loss = cross_entropy_of(buffers.combined, i, j);
    if (!a.row.grad) return loss;
    for (int64_t f = 0; f < a.classes; ++f) {
      const Vec<T> d = load(buffers.combined + f / filters * pairs);
      if (a.readout_grad) {
        // where there is no pair, logits may be anything
        const Vec<T> sums = d == Vec<T>{} ? Vec<T>{} : d * load(logits + f * pairs);
        for (int k = 0; k < pairs; ++k) a.readout_grad[f] += sums[k];
      }
      store(logits + f * pairs, broadcast(a.readout[f]) * d);
    }
    return loss;
  }

  double cross_entropy_of(T* logits, int64_t i, int64_t j) const {
    constexpr int pairs = kPairs<T>;
    const auto row_target = load(buffers.row_target + (i - row_begin) * kColumns<T>);
    const auto column_target = load(buffers.column_target + (j - column_begin) * kRows<T>);
    const auto count = counts(row_target, column_target, i, j);
    const double one_minus_eps = 1 - a.label_smoothing;
    const Vec<T> row_weight = broadcast(T(one_minus_eps * a.row.label)),
                 column_weight = broadcast(T(one_minus_eps * a.column.label));
    const Vec<T> eps_share = broadcast(T(a.label_smoothing / a.labels));
    const bool smooth = a.label_smoothing != 0;
    Vec<T> max = load(logits);
    for (int64_t c = 1; c < a.labels; ++c) max = clamp_min<T>(max, load(logits + c * pairs));
    Vec<T> total = {}, target_logit = {};
    for (int64_t c = 0; c < a.labels; ++c) {
      const Vec<T> shifted = load(logits + c * pairs) - max, e = exponential(shifted);
      total += e;
      target_logit += row_weight * (row_target == Lane<T>(c) ? shifted : Vec<T>{});
      target_logit += column_weight * (column_target == Lane<T>(c) ? shifted : Vec<T>{});
      if (smooth) target_logit += eps_share * shifted;
      store(logits + c * pairs, e);
    }
    // All pairs share one logarithm, of the product of their sums of exponentials. A double holds it, because each sum
    // lies between 1 and C. Where there is no pair, logits may be anything.
    T factors[pairs], terms[pairs];
    store(factors, count == 0 ? Vec<T>{} + 1 : count == 2 ? total * total : total);
    store(terms, count == 0 ? Vec<T>{} : __builtin_convertvector(count, Vec<T>) * target_logit);
    double product[2] = {1, 1}, sum[2] = {};
    for (int k = 0; k < pairs; ++k) {
      product[k % 2] *= double(factors[k]);
      sum[k % 2] += double(terms[k]);
    }
    if (a.row.grad) {
      const Vec<T> weight = broadcast(T(a.pair_weight)) * __builtin_convertvector(count, Vec<T>), norm = weight / total;
      const Vec<T> row_label = row_weight * weight, column_label = column_weight * weight,
                   every_label = eps_share * weight;
      for (int64_t c = 0; c < a.labels; ++c) {
        Vec<T> d = load(logits + c * pairs) * norm;
        d -= row_target == Lane<T>(c) ? row_label : Vec<T>{};
        d -= column_target == Lane<T>(c) ? column_label : Vec<T>{};
        if (smooth) d -= every_label;
        store(logits + c * pairs, count == 0 ? Vec<T>{} : d);
      }
    }
    return a.pair_weight * (::log(product[0] * product[1]) - (sum[0] + sum[1]));
  }
};

template <typename T, int kDegree>
double block_pair_of(const PairwiseMixup<T>& a, int64_t row_block, int64_t column_block, bool upper_triangle,
                     void* memory) {
  const BlockPair<T, kDegree> blocks(a, row_block, column_block, upper_triangle, memory);
  double loss = 0;
  for (int64_t c = 0; c < a.classes; ++c) blocks.logits(c);
  blocks.for_each_tile([&](auto, T* logits, int64_t i, int64_t j) { loss += blocks.cross_entropy(logits, i, j); });
  if (a.row.grad) {
    for (int64_t c = 0; c < a.classes; ++c) blocks.gradient(c);
  }
  return loss;
}

template <typename T>
double block_pair(const PairwiseMixup<T>& a, int64_t row_block, int64_t column_block, bool upper_triangle,
                  void* scratch) {
  const auto f = instance(a.activation, [](auto degree, auto) { return &block_pair_of<T, decltype(degree)::value>; });
  return f(a, row_block, column_block, upper_triangle, scratch);
}

// Values that are not finite get infinite bounds, which skip nothing. Padding gets bounds that pass every test.
template <typename T>
void bounds(const T* t, int64_t samples, int64_t classes, int64_t length, int64_t padded_length, T* bounds) {
  const Vec<T> infinity = broadcast(kInfinity<T>);
  for (int64_t c = 0; c < classes; ++c, bounds += 2 * padded_length) {
    for (int64_t f = 0; f < padded_length; f += kLanes<T>) {
      Vec<T> min = infinity, max = -infinity, nan_mask = {};
      for (int64_t n = 0; n < samples; ++n) {
        const Vec<T> v = load(t + (n * classes + c) * padded_length + f);
        min = clamp_max<T>(v, min);
        max = clamp_min<T>(v, max);
        nan_mask += v * broadcast(T(0));  // 0, or NaN
      }
      store(bounds + f, nan_mask == 0 ? min : -infinity);
      store(bounds + padded_length + f, nan_mask == 0 ? max : infinity);
    }
    for (int64_t f = length; f < padded_length; ++f) {
      bounds[f] = kInfinity<T>;
      bounds[padded_length + f] = -kInfinity<T>;
    }
  }
}

}  // namespace

template <typename T>
PairwiseMixupKernels<T> pairwise_mixup_loss() {
  return {kLanes<T>, scratch_bytes<T>, bounds<T>, block_pair<T>};
}
template PairwiseMixupKernels<float> pairwise_mixup_loss();
template PairwiseMixupKernels<double> pairwise_mixup_loss();

}  // namespace mixfeat::MIXFEAT_ISA
