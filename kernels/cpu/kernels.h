// The one table of kernels between the operators, which are compiled once, and isa/, which is compiled once per
// instruction set.
//
// Both sides include this file, so it may not define inline functions of external linkage: the linker keeps one copy of
// those, and that copy could hold instructions which this processor lacks. tests/test_build.py looks for them.
#pragma once

#include <cstdint>

namespace mixfeat {

static constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// How a tensor stores its elements. Kernels compute in float, or in double for double.
enum class Element { kFloat, kDouble, kBFloat16, kHalf, kByte };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type that is computed in, by the type of an element.
template <typename E>
struct ComputeOf {
  using type = E;
};
template <>
struct ComputeOf<BFloat16> {
  using type = float;
};
template <typename E>
using Compute = typename ComputeOf<E>::type;

// The activation: see kernels/polynomial.py.
struct Polynomial {
  int64_t degree;  // 1 to kMaxDegree
  double threshold, scale;
  bool lower, upper;
  double negative_slope;  // 0 where lower is false
};

constexpr int kMaxDegree = 16;

// ---- mixup

// output_k = sum over r of weights[r] * samples[rows[r]][k], for k in [0, size); samples lie `stride` elements apart.
using WeightedSum = void (*)(const void* samples, int64_t stride, const int64_t* rows, const double* weights,
                             int64_t count, int64_t size, void* output);

// ---- cross_entropy

// The weight of each class: label_c = base + sum over j of values[j] [c = classes[j]] + scale * target_c. Class -1 is
// none.
struct Label {
  double base = 0;
  int64_t classes[2] = {-1, -1};
  double values[2] = {0, 0};
  const void* target = nullptr;  // (C,), or null: no such term
  double scale = 0;
  double lse = 0, lse_square = 0;  // weights of the logsumexp of the logits and of its square
};

// Returns the loss of one row, - sum_c label_c log softmax(logits)_c + label.lse L + label.lse_square L^2, and L, the
// logsumexp of its logits. Writes the gradient of the loss, grad_c = softmax(logits)_c (sum_k label_k + label.lse + 2
// label.lse_square L) - label_c, of the logits' element, unless grad is null. `scratch` holds `classes` numbers of the
// type that is computed in; it is not used where the logits have that type.
struct LossAndLse {
  double loss, lse;
};
using CrossEntropy = LossAndLse (*)(const void* logits, int64_t classes, const Label& label, void* scratch, void* grad);

// ---- binary_cross_entropy

// The label of each class: q_c = base, but values[j] for c = classes[j].
struct BinaryLabel {
  double base;
  int64_t classes[2];
  double values[2];
};

// Returns the loss of one row, sum_c (1 - q_c) x_c + w_c log(1 + e^-x_c), w_c = 1 + (pos_weight_c - 1) q_c, and writes
// each class's loss, and scale times its derivative, of the logits' element, unless `losses` or `grad` are null.
// `pos_weight` (C,) may be null: all are 1. It and `losses` are of the type that is computed in.
using BinaryCrossEntropy = double (*)(const void* logits, int64_t classes, const BinaryLabel& label,
                                      const void* pos_weight, double scale, void* losses, void* grad);

// ---- patch_conv

// R networks on the same data, of elements float, double or BFloat16. Each patch of `input` is contiguous.
template <typename E>
struct PatchConv {
  int64_t samples, patches, patch_dim, runs, classes, filters;  // N, P, D, R, C, M
  int64_t columns;                                              // R*C*M
  const E* input;                                               // (N, P, D)
  int64_t sample_stride, patch_stride;
  const int64_t* index;   // (N,), or null: nothing is mixed
  const Compute<E>* lam;  // () or (N,)
  int64_t lam_stride;
  Polynomial activation;
};

// `forward` and `backward` work on a range of samples. Results depend on the range that a call is given, so callers
// split the samples by shape alone, never by the number of threads.
template <typename E>
struct PatchConvKernels {
  using T = Compute<E>;
  // weight (R*C*M, D) transposed into panels: the right factor of the forward product
  int64_t (*panels_bytes)(const PatchConv<E>&);
  void (*pack_panels)(const PatchConv<E>&, const E* weight, void* panels);
  // weight with its rows padded to row_length: the right factor of the input's gradient
  int64_t (*rows_bytes)(const PatchConv<E>&);
  void (*pack_rows)(const PatchConv<E>&, const E* weight, void* rows);
  int64_t (*row_length)(const PatchConv<E>&);
  int64_t (*weight_grad_size)(const PatchConv<E>&);
  int64_t (*scratch_bytes)(const PatchConv<E>&);

  // logits (R, N, C); slope (saved, P, R*C*M): phi' at the pre-activations of the first `saved` samples
  void (*forward)(const PatchConv<E>&, const void* panels, int64_t begin, int64_t end, T* logits, E* slope,
                  int64_t saved, void* scratch);
  // grad (R, N, C) -> weight_grad (R*C*M, row_length), overwritten; mixed_grad (N, P, D): gradient of the mixed input.
  // Either may be null. panels is not read when every slope is saved, nor rows when mixed_grad is null.
  void (*backward)(const PatchConv<E>&, const void* panels, const void* rows, int64_t begin, int64_t end, const T* grad,
                   const E* slope, int64_t saved, T* weight_grad, E* mixed_grad, void* scratch);
};

// ---- pairwise_mixup_loss

// Samples are padded to whole groups, so that tiles of pairs need no edges. Padding samples are 0 and enter no result.
constexpr int64_t kSampleGroup = 4;

// The samples on one side of the pairs. For each sample and class, the pre-activations of all patches and filters are
// contiguous, and padded with zeros to whole vectors.
template <typename T>
struct MixupSide {
  int64_t samples;
  double weight;    // lam for the rows, 1 - lam for the columns
  double label;     // the share of the samples' labels in the pairs' labels
  const T* t;       // (samples in groups, C, padded_length): weight * s / threshold
  const T* bounds;  // (blocks, C, 2, padded_length): minimum and maximum of t over the samples of a block
  T* grad;          // like t: gradient to s in units of scale / threshold, added to; or null: not wanted
  const int64_t* target;
};

// With a readout, each filter is a class of its own, and the logit of class c is
// sum_m readout[c,m] (sum of filter (c, m)).
//
// A fixed readout of +-1 needs none of that: in each class the filters of -1 come first, with all their patches.
template <typename T>
struct PairwiseMixup {
  int64_t classes, length, padded_length;  // C; P*M; and that in whole vectors. With a readout C*M, and P
  int64_t labels;                          // C
  int64_t block;                           // samples in a block: whole groups
  MixupSide<T> row, column;
  double pair_weight;
  double label_smoothing;
  bool distinct, different_class;  // whether pairs of a sample with itself, or of one class, do not count
  const T* readout;                // (C, M), or null: ones
  double* readout_grad;            // (C, M), added to, or null: not wanted
  const int64_t* negative;         // (C,): how many of the first pre-activations have a readout of -1; or null: none
  Polynomial activation;
  bool skip;  // whether to look for blocks that are zero or linear
};

template <typename T>
struct PairwiseMixupKernels {
  int64_t lanes;
  int64_t (*scratch_bytes)(const PairwiseMixup<T>&);
  // bounds (C, 2, padded_length) of the t of `samples` samples
  void (*bounds)(const T* t, int64_t samples, int64_t classes, int64_t length, int64_t padded_length, T* bounds);
  // Returns the loss of the pairs of a row block and a column block and adds its gradient to both sides:
  //   pair_weight * sum_{i,j} (lam CE(g_ij, y_i) + (1 - lam) CE(g_ij, y_j))
  // With `upper_triangle` both sides are the same samples: only i <= j is visited, and i < j counts twice.
  double (*block_pair)(const PairwiseMixup<T>&, int64_t row_block, int64_t column_block, bool upper_triangle,
                       void* scratch);
};

// ---- gradient_descent

// One network during a step. The columns of `input` and `s` are the patches of all samples, padded with zeros to whole
// vectors: ordered by sample for all pairs, and for the plain cross-entropy by block of `lanes` samples, then patch,
// then sample.
template <typename T>
struct GradientDescent {
  int64_t samples, patches, patch_dim, classes, filters, columns;  // N, P, D, C, C*M
  int64_t padded_length;                                           // as in PairwiseMixup
  Polynomial activation;
  const T* input;         // (D in groups of 4, columns)
  const int64_t* target;  // (N,)
  T* weight;              // (C*M in groups of 4, D)
  T* momentum_buffer;     // (C*M, D), or null
  T* grad;                // (C*M, D): gradient of the weight
  T* s;                   // (C*M in groups of 4, columns): pre-activations, then their gradient
  double label_smoothing;
  const int64_t* negative_filters;  // (C,): how many filters, the first ones, have a readout of -1; or null: none
};

// Functions over a range write nothing outside it, and their results do not depend on the division into ranges.
template <typename T>
struct GradientDescentKernels {
  int64_t lanes, panel;
  // s = weight input, for a range of columns whose size is in whole vectors. `panel` columns at a time are fastest.
  void (*convolve)(const GradientDescent<T>&, int64_t begin, int64_t end);
  // grad = s input^T, for a range of filters that starts at a multiple of 4
  void (*weight_gradient)(const GradientDescent<T>&, int64_t begin, int64_t end);
  // For a range of samples: t = factor * s, as MixupSide has it, but without the padding; and s = factor * the gradient
  // to t. Both may read half a vector beyond the end.
  void (*pack)(const GradientDescent<T>&, T factor, int64_t begin, int64_t end, T* t);
  void (*unpack)(const GradientDescent<T>&, T factor, int64_t begin, int64_t end, const T* t_grad);
  // Returns what a block of samples adds to the mean cross-entropy and replaces its s by the gradient.
  double (*cross_entropy)(const GradientDescent<T>&, int64_t block, void* scratch);
  int64_t (*cross_entropy_scratch_bytes)(const GradientDescent<T>&);
  void (*update)(const GradientDescent<T>&, T lr, T momentum, T weight_decay);
};

// ---- the table

template <typename T>
struct TypedKernels {
  PatchConvKernels<T> patch_conv;
  PairwiseMixupKernels<T> pairwise_mixup_loss;
  GradientDescentKernels<T> gradient_descent;
};

struct Kernels {
  TypedKernels<float> float32;
  TypedKernels<double> float64;
  PatchConvKernels<BFloat16> patch_conv_bfloat16;
  WeightedSum (*weighted_sum)(Element input, Element output);     // null if there is no kernel for these elements
  CrossEntropy (*cross_entropy)(Element logits, Element target);  // likewise; kByte: no dense target
  BinaryCrossEntropy (*binary_cross_entropy)(Element logits);     // likewise
};

// Functions, not objects: initialising an object would run code of an instruction set which this processor may lack.
namespace generic {
Kernels kernels();
}
namespace avx2 {
Kernels kernels();
}
namespace avx512 {
Kernels kernels();
}
namespace avx512_bf16 {
Kernels kernels();
}

}  // namespace mixfeat
