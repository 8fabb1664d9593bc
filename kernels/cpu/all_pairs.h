// How the pairs of samples are divided into blocks, and those among threads.
#pragma once

#include <array>
#include <numeric>
#include <optional>

#include "library.h"

namespace mixfeat {

// The samples of each run ordered by target, because similar samples in a block let more of it be skipped.
struct Order {
  std::vector<int64_t> index, target;  // of the samples in this order
  int64_t stride;                      // between runs: 0 if all have the same targets

  Order(const Tensor& target, int64_t runs, int64_t samples, int64_t classes)
      : index(target.numel()), target(target.numel()), stride(target.dim() == 1 ? 0 : samples) {
    STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.is_contiguous(), "unexpected target");
    STD_TORCH_CHECK(target.numel() == samples * (stride ? runs : 1), "unexpected number of targets");
    for (int64_t r = 0; r < (stride ? runs : 1); ++r) {
      const int64_t* targets = data<int64_t>(target) + r * samples;
      const auto first = index.begin() + r * samples, last = first + samples;
      std::iota(first, last, 0);
      std::stable_sort(first, last, [&](int64_t i, int64_t j) { return targets[i] < targets[j]; });
      std::transform(first, last, this->target.begin() + r * samples, [&](int64_t i) { return targets[i]; });
    }
    for (int64_t y : this->target) STD_TORCH_CHECK(y >= 0 && y < classes, "target out of range");
  }
};

// A fixed readout of +-1: how many filters of each class, (1 or R, C), the first ones, have -1. None: all have 1.
class Negative {
 public:
  Negative(const std::optional<Tensor>& filters, int64_t runs, int64_t classes, int64_t filters_per_class,
           int64_t patches) {
    if (!filters) return;
    STD_TORCH_CHECK(filters->dim() == 2 && filters->scalar_type() == ScalarType::Long && filters->is_contiguous(),
                    "unexpected signs");
    STD_TORCH_CHECK((filters->size(0) == 1 || filters->size(0) == runs) && filters->size(1) == classes,
                    "unexpected signs");
    filters_.assign(data<int64_t>(*filters), data<int64_t>(*filters) + filters->numel());
    for (int64_t n : filters_) STD_TORCH_CHECK(n >= 0 && n <= filters_per_class, "unexpected signs");
    stride_ = filters->size(0) == 1 ? 0 : classes;
    for (int64_t n : filters_) pre_activations_.push_back(n * patches);
  }

  // (C,), or null: none
  const int64_t* filters(int64_t run) const { return filters_.empty() ? nullptr : filters_.data() + run * stride_; }
  const int64_t* pre_activations(int64_t run) const {
    return filters_.empty() ? nullptr : pre_activations_.data() + run * stride_;
  }

 private:
  std::vector<int64_t> filters_, pre_activations_;
  int64_t stride_ = 0;
};

// The pairs of groups of blocks in rounds: no two of one round share a row group or a column group, so that they may
// run at once, and the order of every sum does not depend on the number of threads.
struct Schedule {
  int64_t rows, columns;  // groups on either side
  bool symmetric;         // rows are the columns: each unordered pair once, a group with itself in round 0

  int64_t even() const { return round_up(rows, 2); }
  int64_t rounds() const { return symmetric ? even() : std::max(rows, columns); }
  int64_t tasks(int64_t round) const { return symmetric && round ? even() / 2 : rows; }

  // The pair of groups of a task, or {-1, -1}: the circle method, in which one group stays and the others go round.
  std::array<int64_t, 2> operator()(int64_t round, int64_t task) const {
    std::array<int64_t, 2> none = {-1, -1};
    if (!symmetric) {
      const int64_t column = (task + round) % rounds();
      return column < columns ? std::array<int64_t, 2>{task, column} : none;
    }
    if (round == 0) return {task, task};
    const int64_t circle = even() - 1, turn = round - 1;
    int64_t i = task ? (turn + task) % circle : circle, j = (turn - task + circle) % circle;
    if (i > j) std::swap(i, j);
    return j < rows ? std::array<int64_t, 2>{i, j} : none;
  }
};

// All pairs of two sides, or of one with itself.
template <typename T>
struct AllPairs {
  bool symmetric;
  int64_t block;                    // samples in a block
  int64_t row_blocks, column_blocks;
  int64_t group;                    // blocks in a group
  Schedule schedule;                // of groups
  int64_t work;                     // multiply-adds

  // Small problems need several blocks to keep all cores busy, but large blocks take less time.
  AllPairs(int64_t rows, int64_t columns, bool symmetric, int64_t classes, int64_t padded_length, int64_t min_blocks)
      : symmetric(symmetric), group(1) {
    // The pre-activations and gradients of one class in two blocks should stay in a core's first-level cache.
    const int64_t samples = std::max(rows, columns), sample_size = classes * padded_length;
    const int64_t in_cache = (8 << 10) / int64_t(sizeof(T)) / std::max<int64_t>(1, padded_length);
    block = round_up(std::clamp<int64_t>(std::min(in_cache, samples / min_blocks), 1, 16), kSampleGroup);
    row_blocks = (rows + block - 1) / block;
    column_blocks = (columns + block - 1) / block;
    // Threads wait for each other after a round, so a task should be long enough: 2^20 evaluations take 0.1 ms.
    while (group * group * block * block * sample_size < (1 << 20) && 8 * group * block < samples) group *= 2;
    schedule = {(row_blocks + group - 1) / group, (column_blocks + group - 1) / group, symmetric};
    work = rows * (symmetric ? rows / 2 : columns) * sample_size * 8;
  }

  // Adds the loss of all pairs, weighted by lam_weight, to `losses`, one for each row of the schedule, and its gradient
  // to both sides, and to readout_grad (rows of the schedule, C*M). `for_each(tasks, work, f)` runs f(task, scratch)
  // for all tasks.
  template <typename F>
  void add(const PairwiseMixup<T>& a, double lam_weight, double* losses, const F& for_each) const {
    const auto& block_pair = typed_kernels<T>().pairwise_mixup_loss.block_pair;
    const bool mirrored = symmetric && a.row.weight == 0.5;
    for (int64_t round = 0; round < schedule.rounds(); ++round) {
      for_each(schedule.tasks(round), work / schedule.rounds(), [&](int64_t task, void* scratch) {
        const auto [row_group, column_group] = schedule(round, task);
        if (row_group < 0) return;
        PairwiseMixup<T> b = a;
        for (int64_t i = row_group * group; i < std::min((row_group + 1) * group, row_blocks); ++i) {
          const int64_t first = symmetric && row_group == column_group ? i : column_group * group;
          for (int64_t j = first; j < std::min((column_group + 1) * group, column_blocks); ++j) {
            b.readout_grad = a.readout_grad ? a.readout_grad + task * a.classes : nullptr;
            b.pair_weight = lam_weight * (mirrored && i != j ? 2 : 1);
            losses[task] += block_pair(b, i, j, mirrored && i == j, scratch);
            if (symmetric && !mirrored && i != j) losses[task] += block_pair(b, j, i, false, scratch);
          }
        }
      });
    }
  }
};

}  // namespace mixfeat
