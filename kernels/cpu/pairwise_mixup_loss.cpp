// The all-pairs Mixup loss and its gradient, tile by tile; compiled once per instruction set (see build.py).
//
// A tile is as many pairs as a vector has lanes. Its logits are summed over vectors along (patch, filter), whose lanes are then
// added across so that lanes become pairs: softmax and cross-entropy work on all pairs of the tile at once. The gradient
// evaluates the activation again. All tiles of a pair of blocks go through one class before the next, whose pre-activations then
// stay in the first cache; of the pairs, nothing but their logits is stored, and those of one pair of blocks only.
//
// Where every t of a pair of blocks is in a region in which the activation is 0, a vector is left out; where every t is in one in
// which it is a line, its sum is the sum of a row's share and a column's.

#include "pairwise_mixup_loss.h"

#include <math.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "activation.h"
#include "exponential.h"

namespace mixfeat {
namespace MIXFEAT_ISA {
namespace {

template <typename T>
constexpr int kPairs = kLanes<T>;
template <typename T>
constexpr int kColumns = kPairs<T> >= 8 ? 4 : 2;  // tiles of 4 x 4, 2 x 4, 2 x 2 or 1 x 2 pairs
template <typename T>
constexpr int kRows = kPairs<T> / kColumns<T>;

template <int... kIndices>
struct Indices {};
template <int kCount, int... kIndices>
struct MakeIndices : MakeIndices<kCount - 1, kCount - 1, kIndices...> {};
template <int... kIndices>
struct MakeIndices<0, kIndices...> {
  using type = Indices<kIndices...>;
};

// In each 2 * kBlock lanes: sums of neighbouring blocks of a, then those of b.
template <typename T, int kBlock, int... kIndices>
inline Vec<T> fold(Vec<T> a, Vec<T> b, Indices<kIndices...>) {
  constexpr int n = sizeof...(kIndices);
  return __builtin_shufflevector(a, b, (kIndices % (2 * kBlock) < kBlock ? kIndices : kIndices - kBlock + n)...) +
         __builtin_shufflevector(a, b, (kIndices % (2 * kBlock) < kBlock ? kIndices + kBlock : kIndices + n)...);
}

// The vector whose lane k is the sum of the lanes of v[k].
template <typename T, int kBlock = 1>
inline Vec<T> sum_each(Vec<T>* v) {
  if constexpr (kBlock == kLanes<T>) {
    return v[0];
  } else {
#pragma GCC unroll 8
    for (int k = 0; k < kLanes<T> / kBlock / 2; ++k) {
      v[k] = fold<T, kBlock>(v[2 * k], v[2 * k + 1], typename MakeIndices<kLanes<T>>::type());
    }
    return sum_each<T, 2 * kBlock>(v);
  }
}

// Lane k takes the value of lane k + kDistance.
template <typename T, int kDistance, int... kIndices>
inline Vec<T> rotate(Vec<T> v, Indices<kIndices...>) {
  return __builtin_shufflevector(v, v, ((kIndices + kDistance) % kLanes<T>)...);
}

// The greatest of the lanes.
template <typename T, int kDistance = kLanes<T> / 2>
inline T greatest_lane(Vec<T> v) {
  if constexpr (kDistance == 0) {
    return v[0];
  } else {
    return greatest_lane<T, kDistance / 2>(at_least<T>(rotate<T, kDistance>(v, typename MakeIndices<kLanes<T>>::type()), v));
  }
}

// Scratch of a pair of blocks. For each class it lists the vectors along (patch, filter) by their offsets: those to evaluate,
// and those on the line.
template <typename T>
struct Scratch {
  T* logits;                  // (tiles, C, pairs of a tile); then D = (softmax - target) * weight of the pair
  T *row_line, *column_line;  // (C, block): sums over the vectors on the line
  T *row_d, *column_d;        // (C, block): sums of D, for classes that have such vectors
  int32_t *active_count, *line_count;  // (C,)
  int32_t *active, *line;              // (C, length / lanes)

  static int64_t size(const PairwiseMixup<T>& a) {
    return a.classes * (a.block * a.block + 4 * a.block + 2 + 2 * (a.length / kLanes<T>));
  }

  Scratch(const PairwiseMixup<T>& a, T* memory) {
    auto take = [&](int64_t count) { return std::exchange(memory, memory + a.classes * count); };
    static_assert(sizeof(T) >= sizeof(int32_t), "");
    auto take_int = [&](int64_t count) { return reinterpret_cast<int32_t*>(take(count)); };
    logits = take(a.block * a.block);
    row_line = take(a.block);
    column_line = take(a.block);
    row_d = take(a.block);
    column_d = take(a.block);
    active_count = take_int(1);
    line_count = take_int(1);
    active = take_int(a.length / kLanes<T>);
    line = take_int(a.length / kLanes<T>);
  }
};

template <typename T>
struct BlockPair {
  const PairwiseMixup<T>& a;
  const Scratch<T> scratch;
  const int64_t row_begin, row_end, column_begin, column_end;  // in whole groups
  const bool upper;

  BlockPair(const PairwiseMixup<T>& a, int64_t row_block, int64_t column_block, bool upper, T* memory)
      : a(a),
        scratch(a, memory),
        row_begin(row_block * a.block),
        row_end(end(a.row, row_begin)),
        column_begin(column_block * a.block),
        column_end(end(a.column, column_begin)),
        upper(upper) {
    list_vectors(row_block, column_block);
  }

  int64_t end(const MixupSide<T>& side, int64_t begin) const {
    return std::min(begin + a.block, (side.samples + kSampleGroup - 1) / kSampleGroup * kSampleGroup);
  }

  int64_t offset(int64_t n, int64_t c) const { return (n * a.classes + c) * a.length; }
  int64_t vectors() const { return a.length / kLanes<T>; }

  // Sorts the vectors of each class into those that are 0 for all pairs of the blocks, on the line for all, and the others.
  void list_vectors(int64_t row_block, int64_t column_block) {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    const Polynomial& phi = a.activation;
    const T zero_until = phi.lower ? T(0) : -infinity;
    const T line_from = phi.degree == 1 ? zero_until : phi.upper ? T(1) : infinity;
    for (int64_t c = 0; c < a.classes; ++c) {
      const T* row = a.row.bounds + (row_block * a.classes + c) * 2 * a.length;
      const T* column = a.column.bounds + (column_block * a.classes + c) * 2 * a.length;
      int32_t active = 0, line = 0;
      for (int64_t f = 0; f < a.length; f += kLanes<T>) {
        if (a.skip) {
          if (greatest_lane<T>(load(row + a.length + f) + load(column + a.length + f)) <= zero_until) continue;
          if (-greatest_lane<T>(-(load(row + f) + load(column + f))) >= line_from) {
            scratch.line[c * vectors() + line++] = int32_t(f);
            continue;
          }
        }
        scratch.active[c * vectors() + active++] = int32_t(f);
      }
      scratch.active_count[c] = active;
      scratch.line_count[c] = line;
      if (line) sum_line(c);
    }
  }

  // On the line degree / scale * phi(t) = degree * t + 1 - degree, t being the sum of a row's share and a column's.
  void sum_line(int64_t c) {
    const T degree = T(a.activation.degree), scale = T(a.activation.scale / a.activation.degree);
    const int32_t* line = scratch.line + c * vectors();
    int64_t lanes = 0;
    for (int32_t k = 0; k < scratch.line_count[c]; ++k) lanes += std::min<int64_t>(kLanes<T>, a.features - line[k]);
    auto sum = [&](const T* t, T constant) {
      Vec<T> total = {};
      for (int32_t k = 0; k < scratch.line_count[c]; ++k) total += load(t + line[k]);
      T result = 0;
      for (int k = 0; k < kLanes<T>; ++k) result += total[k];
      return scale * (degree * result + constant);
    };
    for (int64_t i = row_begin; i < row_end; ++i) {
      scratch.row_line[c * a.block + i - row_begin] = sum(a.row.t + offset(i, c), (1 - degree) * T(lanes));
    }
    for (int64_t j = column_begin; j < column_end; ++j) {
      scratch.column_line[c * a.block + j - column_begin] = sum(a.column.t + offset(j, c), 0);
    }
    std::fill_n(scratch.row_d + c * a.block, a.block, T(0));
    std::fill_n(scratch.column_d + c * a.block, a.block, T(0));
  }

  // f(logits of the tile, its first row, its first column)
  template <typename F>
  void for_each_tile(const F& f) const {
    T* logits = scratch.logits;
    for (int64_t i = row_begin; i < row_end; i += kRows<T>) {
      const int64_t first = upper ? i / kColumns<T> * kColumns<T> : column_begin;
      for (int64_t j = first; j < column_end; j += kColumns<T>, logits += a.classes * kPairs<T>) f(logits, i, j);
    }
  }

  template <typename Phi>
  void logits(const Phi& phi, int64_t c) const {
    constexpr int rows = kRows<T>, columns = kColumns<T>;
    const int64_t stride = a.classes * a.length;
    const int32_t *begin = scratch.active + c * vectors(), *end = begin + scratch.active_count[c];
    const Vec<T> scale = broadcast(T(a.activation.scale / a.activation.degree));
    const bool line = scratch.line_count[c];
    for_each_tile([&](T* logits, int64_t i, int64_t j) {
      const T *x = a.row.t + offset(i, c), *y = a.column.t + offset(j, c);
      Vec<T> sums[kPairs<T>] = {};
      for (const int32_t* active = begin; active < end; ++active) {
        Vec<T> second[columns];
#pragma GCC unroll 4
        for (int k = 0; k < columns; ++k) second[k] = load(y + k * stride + *active);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
          const Vec<T> first = load(x + r * stride + *active);
#pragma GCC unroll 4
          for (int k = 0; k < columns; ++k) {
            sums[r * columns + k] = phi.add_to(sums[r * columns + k], first + second[k]);
          }
        }
      }
      T* out = logits + c * kPairs<T>;
      store(out, sum_each<T>(sums) * scale);
      if (line) {
        for (int k = 0; k < kPairs<T>; ++k) {
          out[k] += scratch.row_line[c * a.block + i - row_begin + k / columns] +
                    scratch.column_line[c * a.block + j - column_begin + k % columns];
        }
      }
    });
  }

  template <typename Phi>
  void gradient(const Phi& phi, int64_t c) const {
    constexpr int rows = kRows<T>, columns = kColumns<T>;
    const Vec<T> row_weight = broadcast(T(a.row.weight)), column_weight = broadcast(T(a.column.weight));
    const int64_t stride = a.classes * a.length;
    const int32_t *begin = scratch.active + c * vectors(), *end = begin + scratch.active_count[c];
    const bool line = scratch.line_count[c];
    for_each_tile([&](const T* logits, int64_t i, int64_t j) {
      const T *x = a.row.t + offset(i, c), *y = a.column.t + offset(j, c), *d = logits + c * kPairs<T>;
      T *dx = a.row.slope + offset(i, c), *dy = a.column.slope + offset(j, c);
      for (const int32_t* active = begin; active < end; ++active) {
        const int64_t f = *active;
        Vec<T> second[columns], by_column[columns] = {};
#pragma GCC unroll 4
        for (int k = 0; k < columns; ++k) second[k] = load(y + k * stride + f);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
          const Vec<T> first = load(x + r * stride + f);
          Vec<T> by_row = {};
#pragma GCC unroll 4
          for (int k = 0; k < columns; ++k) {
            const Vec<T> e = phi.slope_times(first + second[k], broadcast(d[r * columns + k]));
            by_row += e;
            by_column[k] += e;
          }
          store(dx + r * stride + f, load(dx + r * stride + f) + row_weight * by_row);
        }
#pragma GCC unroll 4
        for (int k = 0; k < columns; ++k) {  // after the rows: i and j may be the same samples
          store(dy + k * stride + f, load(dy + k * stride + f) + column_weight * by_column[k]);
        }
      }
      if (line) {
        for (int k = 0; k < kPairs<T>; ++k) {
          scratch.row_d[c * a.block + i - row_begin + k / columns] += d[k];
          scratch.column_d[c * a.block + j - column_begin + k % columns] += d[k];
        }
      }
    });
    if (line) line_gradient(c);
  }

  // On the line phi' = scale / threshold: each vector there gets the sum of D over a sample's pairs.
  void line_gradient(int64_t c) const {
    const int32_t *begin = scratch.line + c * vectors(), *end = begin + scratch.line_count[c];
    auto add = [&](T* slope, double weight, T d) {
      for (const int32_t* line = begin; line < end; ++line) {
        store(slope + *line, load(slope + *line) + broadcast(T(weight) * d));
      }
    };
    for (int64_t i = row_begin; i < row_end; ++i) {
      add(a.row.slope + offset(i, c), a.row.weight, scratch.row_d[c * a.block + i - row_begin]);
    }
    for (int64_t j = column_begin; j < column_end; ++j) {
      add(a.column.slope + offset(j, c), a.column.weight, scratch.column_d[c * a.block + j - column_begin]);
    }
  }

  // Logits to D and to the tile's share of the loss.
  double cross_entropy(T* logits, int64_t i, int64_t j) const {
    constexpr int pairs = kPairs<T>;
    Vec<T> highest = load(logits);
    for (int64_t c = 1; c < a.classes; ++c) highest = at_least<T>(load(logits + c * pairs), highest);
    // log(sum of exponentials) of all pairs that count alike by one logarithm, of their product: a double holds it, as each
    // sum lies between 1 and C
    struct {
      double product = 1, sum = 0;
    } once, twice;
    T weight[pairs], target_logit[pairs];
    for (int k = 0; k < pairs; ++k) {
      const int64_t n = i + k / kColumns<T>, m = j + k % kColumns<T>;
      const bool visited = n < a.row.samples && m < a.column.samples && !(upper && n > m);
      weight[k] = visited ? T(a.pair_weight * (upper && n < m ? 2 : 1)) : T(0);
      target_logit[k] = 0;
      if (visited) {
        target_logit[k] = T(a.row.weight) * logits[a.row.target[n] * pairs + k] +
                          T(a.column.weight) * logits[a.column.target[m] * pairs + k];
      }
    }
    Vec<T> total = {};
    for (int64_t c = 0; c < a.classes; ++c) {
      const Vec<T> e = exponential(load(logits + c * pairs) - highest);
      total += e;
      store(logits + c * pairs, e);
    }
    const Vec<T> norm = load(weight) / total;
    if (a.row.slope) {
      for (int64_t c = 0; c < a.classes; ++c) store(logits + c * pairs, load(logits + c * pairs) * norm);
    }
    for (int k = 0; k < pairs; ++k) {
      if (weight[k] == 0) {  // whatever its logits are, the pair is not there
        for (int64_t c = 0; c < a.classes; ++c) logits[c * pairs + k] = 0;
        continue;
      }
      const int64_t n = i + k / kColumns<T>, m = j + k % kColumns<T>;
      logits[a.row.target[n] * pairs + k] -= T(a.row.weight) * weight[k];
      logits[a.column.target[m] * pairs + k] -= T(a.column.weight) * weight[k];
      auto& group = upper && n < m ? twice : once;
      group.product *= double(total[k]);
      group.sum += double(highest[k]) - double(target_logit[k]);
    }
    return a.pair_weight * (once.sum + ::log(once.product) + 2 * (twice.sum + ::log(twice.product)));
  }
};

template <typename T, int kDegree>
double block_pair_of(const PairwiseMixup<T>& a, int64_t row_block, int64_t column_block, bool upper, T* memory) {
  const Activation<T, kDegree, true> phi(a.activation.lower, a.activation.upper);
  const BlockPair<T> blocks(a, row_block, column_block, upper, memory);
  double loss = 0;
  for (int64_t c = 0; c < a.classes; ++c) blocks.logits(phi, c);
  blocks.for_each_tile([&](T* logits, int64_t i, int64_t j) { loss += blocks.cross_entropy(logits, i, j); });
  if (a.row.slope) {
    for (int64_t c = 0; c < a.classes; ++c) blocks.gradient(phi, c);
  }
  return loss;
}

template <typename T>
using BlockPairFunction = double (*)(const PairwiseMixup<T>&, int64_t, int64_t, bool, T*);

template <typename T, int... kDegrees>
BlockPairFunction<T> pick(int64_t degree, Degrees<kDegrees...>) {
  constexpr BlockPairFunction<T> table[] = {block_pair_of<T, kDegrees>...};
  return table[degree - 1];
}

template <typename T>
double block_pair(const PairwiseMixup<T>& a, int64_t row_block, int64_t column_block, bool upper, T* scratch) {
  return pick<T>(a.activation.degree, AllDegrees())(a, row_block, column_block, upper, scratch);
}

// What no bounds hold for, as a value is not finite, is given infinite ones; padding is given bounds that every test passes.
template <typename T>
void bounds(const T* t, int64_t samples, int64_t classes, int64_t features, int64_t length, T* bounds) {
  const Vec<T> infinity = broadcast(std::numeric_limits<T>::infinity());
  for (int64_t c = 0; c < classes; ++c, bounds += 2 * length) {
    for (int64_t f = 0; f < length; f += kLanes<T>) {
      Vec<T> least = infinity, greatest = -infinity, not_finite = {};
      for (int64_t n = 0; n < samples; ++n) {
        const Vec<T> v = load(t + (n * classes + c) * length + f);
        least = at_most<T>(least, v);
        greatest = at_least<T>(greatest, v);
        not_finite += v * broadcast(T(0));  // 0, or NaN
      }
      store(bounds + f, not_finite == 0 ? least : -infinity);
      store(bounds + length + f, not_finite == 0 ? greatest : infinity);
    }
    std::fill(bounds + features, bounds + length, infinity[0]);
    std::fill(bounds + length + features, bounds + 2 * length, -infinity[0]);
  }
}

}  // namespace

const PairwiseMixupKernels<float> pairwise_mixup_loss_float = {kLanes<float>, Scratch<float>::size, bounds<float>,
                                                               block_pair<float>};
const PairwiseMixupKernels<double> pairwise_mixup_loss_double = {kLanes<double>, Scratch<double>::size, bounds<double>,
                                                                 block_pair<double>};

}  // namespace MIXFEAT_ISA
}  // namespace mixfeat
