// The all-pairs Mixup loss and its gradient, tile by tile.
//
// A tile is as many pairs as a vector has lanes. Its logits are summed over vectors along (patch, filter), whose lanes are then
// summed so that lanes become pairs: softmax and cross-entropy work on all pairs of the tile at once. The gradient evaluates the
// activation again. All tiles of a pair of blocks go through one class before the next, whose pre-activations then stay in the
// first-level cache. Only the logits of the pairs are stored, for one pair of blocks at a time.
//
// A vector whose every t, over a pair of blocks, lies where the activation is 0 is left out. Where the activation is linear, its
// sum separates into a row's share and a column's.

#include <math.h>

#include "../kernels.h"
#include "activation.h"
#include "exponential.h"
#include "scratch.h"

namespace mixfeat::MIXFEAT_ISA {
namespace {

template <typename T>
constexpr int kPairs = kLanes<T>;
template <typename T>
constexpr int kColumns = kPairs<T> >= 8 ? 4 : 2;  // tiles of 4 x 4, 2 x 4, 2 x 2 or 1 x 2 pairs
template <typename T>
constexpr int kRows = kPairs<T> / kColumns<T>;

template <typename T>
using LaneIndices = std::make_integer_sequence<int, kLanes<T>>;

// In each 2 * kBlock lanes: sums of neighbouring blocks of a, then those of b.
template <typename T, int kBlock, int... kIndices>
inline Vec<T> fold(Vec<T> a, Vec<T> b, std::integer_sequence<int, kIndices...>) {
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
      v[k] = fold<T, kBlock>(v[2 * k], v[2 * k + 1], LaneIndices<T>());
    }
    return sum_each<T, 2 * kBlock>(v);
  }
}

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

// The buffers of a pair of blocks. For each class they list the vectors along (patch, filter) by their offsets: the active ones,
// which are evaluated, and the linear ones.
template <typename T>
struct Buffers {
  Scratch scratch;
  T* logits;                             // (tiles, C, pairs of a tile); then D = (softmax - target) * weight of the pair
  T *row_linear, *column_linear;         // (C, block): sums over the linear vectors
  T *row_d, *column_d;                   // (C, block): sums of D, for classes that have linear vectors
  int32_t *active_count, *linear_count;  // (C,)
  int32_t *active, *linear;              // (C, vectors)

  Buffers(const PairwiseMixup<T>& a, void* memory)
      : scratch(memory),
        logits(scratch.take<T>(a.classes * a.block * a.block)),
        row_linear(scratch.take<T>(a.classes * a.block)),
        column_linear(scratch.take<T>(a.classes * a.block)),
        row_d(scratch.take<T>(a.classes * a.block)),
        column_d(scratch.take<T>(a.classes * a.block)),
        active_count(scratch.take<int32_t>(a.classes)),
        linear_count(scratch.take<int32_t>(a.classes)),
        active(scratch.take<int32_t>(a.classes * (a.padded_length / kLanes<T>))),
        linear(scratch.take<int32_t>(a.classes * (a.padded_length / kLanes<T>))) {}
};

template <typename T>
int64_t scratch_bytes(const PairwiseMixup<T>& a) {
  return Buffers<T>(a, nullptr).scratch.bytes();
}

template <typename T>
struct BlockPair {
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
  }

  int64_t end(const MixupSide<T>& side, int64_t begin) const {
    return min(begin + a.block, round_up(side.samples, kSampleGroup));
  }

  int64_t offset(int64_t n, int64_t c) const { return (n * a.classes + c) * a.padded_length; }
  int64_t vectors() const { return a.padded_length / kLanes<T>; }

  // Sorts the vectors of each class into zero for all pairs of the blocks (left out), linear for all, and active.
  void list_vectors(int64_t row_block, int64_t column_block) {
    const Polynomial& phi = a.activation;
    const T zero_max = phi.lower ? T(0) : -kInfinity<T>;
    const T linear_min = phi.degree == 1 ? zero_max : phi.upper ? T(1) : kInfinity<T>;
    for (int64_t c = 0; c < a.classes; ++c) {
      const T* row = a.row.bounds + (row_block * a.classes + c) * 2 * a.padded_length;
      const T* column = a.column.bounds + (column_block * a.classes + c) * 2 * a.padded_length;
      int32_t active = 0, linear = 0;
      for (int64_t f = 0; f < a.padded_length; f += kLanes<T>) {
        if (a.skip) {
          if (max_lane<T>(load(row + a.padded_length + f) + load(column + a.padded_length + f)) <= zero_max) continue;
          if (-max_lane<T>(-(load(row + f) + load(column + f))) >= linear_min) {
            buffers.linear[c * vectors() + linear++] = int32_t(f);
            continue;
          }
        }
        buffers.active[c * vectors() + active++] = int32_t(f);
      }
      buffers.active_count[c] = active;
      buffers.linear_count[c] = linear;
      if (linear) sum_linear(c);
    }
  }

  // Where phi is linear, degree / scale * phi(t) = degree * t + 1 - degree, and t is the sum of a row's share and a column's.
  void sum_linear(int64_t c) {
    const T degree = T(a.activation.degree), scale = T(a.activation.scale / a.activation.degree);
    const int32_t* linear = buffers.linear + c * vectors();
    int64_t lanes = 0;
    for (int32_t k = 0; k < buffers.linear_count[c]; ++k) lanes += min(kLanes<T>, a.length - linear[k]);
    auto sum = [&](const T* t, T constant) {
      Vec<T> total = {};
      for (int32_t k = 0; k < buffers.linear_count[c]; ++k) total += load(t + linear[k]);
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

  // f(logits of the tile, its first row, its first column)
  template <typename F>
  void for_each_tile(const F& f) const {
    T* logits = buffers.logits;
    for (int64_t i = row_begin; i < row_end; i += kRows<T>) {
      const int64_t first = upper_triangle ? i / kColumns<T> * kColumns<T> : column_begin;
      for (int64_t j = first; j < column_end; j += kColumns<T>, logits += a.classes * kPairs<T>) f(logits, i, j);
    }
  }

  template <typename Phi>
  void logits(const Phi& phi, int64_t c) const {
    constexpr int rows = kRows<T>, columns = kColumns<T>;
    const int64_t stride = a.classes * a.padded_length;
    const int32_t *begin = buffers.active + c * vectors(), *end = begin + buffers.active_count[c];
    const Vec<T> scale = broadcast(T(a.activation.scale / a.activation.degree));
    const bool linear = buffers.linear_count[c];
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
      if (linear) {
        for (int k = 0; k < kPairs<T>; ++k) {
          out[k] += buffers.row_linear[c * a.block + i - row_begin + k / columns] +
                    buffers.column_linear[c * a.block + j - column_begin + k % columns];
        }
      }
    });
  }

  template <typename Phi>
  void gradient(const Phi& phi, int64_t c) const {
    constexpr int rows = kRows<T>, columns = kColumns<T>;
    const Vec<T> row_weight = broadcast(T(a.row.weight)), column_weight = broadcast(T(a.column.weight));
    const int64_t stride = a.classes * a.padded_length;
    const int32_t *begin = buffers.active + c * vectors(), *end = begin + buffers.active_count[c];
    const bool linear = buffers.linear_count[c];
    for_each_tile([&](const T* logits, int64_t i, int64_t j) {
      const T *x = a.row.t + offset(i, c), *y = a.column.t + offset(j, c), *d = logits + c * kPairs<T>;
      T *dx = a.row.grad + offset(i, c), *dy = a.column.grad + offset(j, c);
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
      if (linear) {
        for (int k = 0; k < kPairs<T>; ++k) {
          buffers.row_d[c * a.block + i - row_begin + k / columns] += d[k];
          buffers.column_d[c * a.block + j - column_begin + k % columns] += d[k];
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
        store(grad + *linear, load(grad + *linear) + broadcast(T(weight) * d));
      }
    };
    for (int64_t i = row_begin; i < row_end; ++i) {
      add(a.row.grad + offset(i, c), a.row.weight, buffers.row_d[c * a.block + i - row_begin]);
    }
    for (int64_t j = column_begin; j < column_end; ++j) {
      add(a.column.grad + offset(j, c), a.column.weight, buffers.column_d[c * a.block + j - column_begin]);
    }
  }

  // Replaces the logits of a tile by D and returns the tile's share of the loss.
  double cross_entropy(T* logits, int64_t i, int64_t j) const {
    constexpr int pairs = kPairs<T>;
    Vec<T> max = load(logits);
    for (int64_t c = 1; c < a.classes; ++c) max = clamp_min<T>(max, load(logits + c * pairs));
    // All pairs of one weight share one logarithm, of the product of their sums of exponentials. A double holds it, because each
    // sum lies between 1 and C.
    struct {
      double product = 1, sum = 0;
    } once, twice;
    T weight[pairs], target_logit[pairs];
    for (int k = 0; k < pairs; ++k) {
      const int64_t n = i + k / kColumns<T>, m = j + k % kColumns<T>;
      const bool visited = n < a.row.samples && m < a.column.samples && !(upper_triangle && n > m);
      weight[k] = visited ? T(a.pair_weight * (upper_triangle && n < m ? 2 : 1)) : T(0);
      target_logit[k] = 0;
      if (visited) {
        target_logit[k] =
            T(a.row.weight) * logits[a.row.target[n] * pairs + k] + T(a.column.weight) * logits[a.column.target[m] * pairs + k];
      }
    }
    Vec<T> total = {};
    for (int64_t c = 0; c < a.classes; ++c) {
      const Vec<T> e = exponential(load(logits + c * pairs) - max);
      total += e;
      store(logits + c * pairs, e);
    }
    const Vec<T> norm = load(weight) / total;
    if (a.row.grad) {
      for (int64_t c = 0; c < a.classes; ++c) store(logits + c * pairs, load(logits + c * pairs) * norm);
    }
    for (int k = 0; k < pairs; ++k) {
      if (weight[k] == 0) {  // not a pair, so its logits may be anything
        for (int64_t c = 0; c < a.classes; ++c) logits[c * pairs + k] = 0;
        continue;
      }
      const int64_t n = i + k / kColumns<T>, m = j + k % kColumns<T>;
      logits[a.row.target[n] * pairs + k] -= T(a.row.weight) * weight[k];
      logits[a.column.target[m] * pairs + k] -= T(a.column.weight) * weight[k];
      auto& group = upper_triangle && n < m ? twice : once;
      group.product *= double(total[k]);
      group.sum += double(max[k]) - double(target_logit[k]);
    }
    return a.pair_weight * (once.sum + ::log(once.product) + 2 * (twice.sum + ::log(twice.product)));
  }
};

template <typename T, int kDegree>
double block_pair_of(const PairwiseMixup<T>& a, int64_t row_block, int64_t column_block, bool upper_triangle, void* memory) {
  const Activation<T, kDegree, true> phi(a.activation.lower, a.activation.upper);
  const BlockPair<T> blocks(a, row_block, column_block, upper_triangle, memory);
  double loss = 0;
  for (int64_t c = 0; c < a.classes; ++c) blocks.logits(phi, c);
  blocks.for_each_tile([&](T* logits, int64_t i, int64_t j) { loss += blocks.cross_entropy(logits, i, j); });
  if (a.row.grad) {
    for (int64_t c = 0; c < a.classes; ++c) blocks.gradient(phi, c);
  }
  return loss;
}

template <typename T>
double block_pair(const PairwiseMixup<T>& a, int64_t row_block, int64_t column_block, bool upper_triangle, void* scratch) {
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
