// The all-pairs Mixup loss on one CPU instruction set: what pairwise_mixup_loss_library.cpp calls and pairwise_mixup_loss.cpp
// defines.
#pragma once

#include "polynomial.h"

namespace mixfeat {

// Samples come in whole groups, so that tiles of pairs need no edges: what pads the last group is 0 and enters no result.
constexpr int64_t kSampleGroup = 4;

// The samples on one side of the pairs. For each sample and class the pre-activations of all patches and filters lie side by
// side, `length` of them: P*M, padded with zeros to whole vectors.
template <typename T>
struct MixupSide {
  int64_t samples;
  double weight;    // lam of the rows, 1 - lam of the columns
  const T* t;       // (samples in groups, C, length): weight * s / threshold
  const T* bounds;  // (blocks, C, 2, length): over the samples of a block, the least and the greatest t
  T* slope;         // like t: gradient to s in units of scale / threshold, added to; null where none is asked for
  const int64_t* target;
};

template <typename T>
struct PairwiseMixup {
  int64_t classes, features, length;  // C, P*M, and that padded
  int64_t block;                      // samples in a block: whole groups
  MixupSide<T> row, column;
  double pair_weight;
  Polynomial activation;
  bool skip;  // whether to look for blocks that are zero or linear
};

template <typename T>
struct PairwiseMixupKernels {
  int64_t lanes;
  int64_t (*scratch_size)(const PairwiseMixup<T>&);
  // the least and the greatest t of `samples` samples
  void (*bounds)(const T* t, int64_t samples, int64_t classes, int64_t features, int64_t length, T* bounds);
  // Sum over the pairs of a row block and a column block of pair_weight * (lam CE(g_ij, y_i) + (1 - lam) CE(g_ij, y_j)), with
  // its gradient added to the slopes. With `upper` both sides are the same samples and only i <= j is visited, i < j
  // counting twice.
  double (*block_pair)(const PairwiseMixup<T>&, int64_t row_block, int64_t column_block, bool upper, T* scratch);
};

#define MIXFEAT_DECLARE(ISA)                                            \
  namespace ISA {                                                       \
  extern const PairwiseMixupKernels<float> pairwise_mixup_loss_float;   \
  extern const PairwiseMixupKernels<double> pairwise_mixup_loss_double; \
  }
MIXFEAT_DECLARE(generic)
MIXFEAT_DECLARE(avx2)
MIXFEAT_DECLARE(avx512)
#undef MIXFEAT_DECLARE

}  // namespace mixfeat
