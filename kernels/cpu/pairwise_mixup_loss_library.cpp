// torch.ops.mixfeat_cpu.pairwise_mixup_loss: orders and packs the samples, cuts the pairs into blocks and owns all memory. Arguments
// were checked in Python (mixfeat/functional.py, mixfeat/ops); only what would break memory is checked again.

#include <array>
#include <numeric>
#include <optional>

#include "library.h"
#include "pairwise_mixup_loss.h"

namespace mixfeat {
namespace {

template <typename T>
const PairwiseMixupKernels<T>& kernels();
template <>
const PairwiseMixupKernels<float>& kernels() {
  return *MIXFEAT_SELECT(pairwise_mixup_loss, float);
}
template <>
const PairwiseMixupKernels<double>& kernels() {
  return *MIXFEAT_SELECT(pairwise_mixup_loss, double);
}

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Pre-activations (R, N, P, C, M) of any strides.
template <typename T>
struct Samples {
  T* data;
  std::array<int64_t, 5> size, stride;

  explicit Samples(const Tensor& s) : data(mixfeat::data<T>(s)) {
    STD_TORCH_CHECK(s.dim() == 5 && s.scalar_type() == kType<T>, "unexpected shape or dtype");
    std::copy_n(s.sizes().begin(), 5, size.begin());
    std::copy_n(s.strides().begin(), 5, stride.begin());
  }

  // f(packed index, element) for all elements of sample n in run r; class c starts at c * length
  template <typename F>
  void visit(int64_t r, int64_t n, int64_t length, const F& f) const {
    const auto [runs, samples, patches, classes, filters] = size;
    T* sample = data + r * stride[0] + n * stride[1];
    for (int64_t p = 0; p < patches; ++p) {
      for (int64_t c = 0; c < classes; ++c) {
        T* s = sample + p * stride[2] + c * stride[3];
        const int64_t to = c * length + p * filters;
        if (stride[4] == 1) {
          for (int64_t m = 0; m < filters; ++m) f(to + m, s[m]);
        } else {
          for (int64_t m = 0; m < filters; ++m) f(to + m, s[m * stride[4]]);
        }
      }
    }
  }
};

// One side of the pairs, for all runs: samples ordered by target, so that those of a block are alike, and packed.
template <typename T>
struct Side {
  Samples<T> s;
  int64_t samples, length, block, blocks, size, bounds_size;
  int64_t target_stride;  // of a run: 0 where all have the same targets
  std::vector<int64_t> order, target;  // in the order of the packed samples: their indices and their classes
  Tensor t, bounds, slope;

  Side(const Tensor& s, const Tensor& target, int64_t length, int64_t block, bool need_grad)
      : s(s), samples(s.size(1)), length(length), block(block), blocks((samples + block - 1) / block) {
    const bool shared = target.dim() == 1;
    STD_TORCH_CHECK(target.numel() == samples * (shared ? 1 : runs()) && target.is_contiguous(), "unexpected target");
    STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "unexpected dtype of target");
    target_stride = shared ? 0 : samples;
    order.resize(target.numel());
    this->target.resize(target.numel());
    for (int64_t r = 0; r < (shared ? 1 : runs()); ++r) {
      const int64_t* given = data<int64_t>(target) + r * samples;
      const auto first = order.begin() + r * samples, last = first + samples;
      std::iota(first, last, 0);
      std::stable_sort(first, last, [&](int64_t i, int64_t j) { return given[i] < given[j]; });
      std::transform(first, last, this->target.begin() + r * samples, [&](int64_t i) { return given[i]; });
    }
    for (int64_t y : this->target) STD_TORCH_CHECK(y >= 0 && y < classes(), "target out of range");
    size = round_up(samples, kSampleGroup) * classes() * length;
    bounds_size = blocks * classes() * 2 * length;
    t = empty({runs(), size}, kType<T>);
    bounds = empty({runs(), bounds_size}, kType<T>);
    slope = empty({runs(), need_grad ? size : 0}, kType<T>);
    if (need_grad) torch::stable::zero_(slope);
  }

  int64_t runs() const { return s.size[0]; }
  int64_t classes() const { return s.size[3]; }
  int64_t features() const { return s.size[2] * s.size[4]; }

  // t = factor * s, with its bounds.
  void pack(T factor) {
    T *to = data<T>(t), *to_bounds = data<T>(bounds);
    const int64_t sample_size = classes() * length;
    for_each_task<T>(runs() * blocks, runs() * size * 8, 0, [&](int64_t task, T*) {
      const int64_t r = task / blocks, b = task % blocks, first = b * block;
      const int64_t last = std::min(first + block, samples), end = round_up(last, kSampleGroup);
      T* out = to + r * size;
      if (features() < length) std::fill(out + first * sample_size, out + last * sample_size, T(0));
      std::fill(out + last * sample_size, out + end * sample_size, T(0));
      for (int64_t k = first; k < last; ++k) {
        s.visit(r, order[r * target_stride + k], length, [factor, x = out + k * sample_size](int64_t f, T v) { x[f] = factor * v; });
      }
      kernels<T>().bounds(out + first * sample_size, last - first, classes(), features(), length,
                          to_bounds + r * bounds_size + b * classes() * 2 * length);
    });
  }

  // grad = factor * slope
  void unpack(const Tensor& grad, T factor) const {
    const Samples<T> to(grad);
    STD_TORCH_CHECK(to.size == s.size, "unexpected shape");
    const T* from = data<T>(slope);
    for_each_task<T>(runs() * blocks, runs() * size * 8, 0, [&](int64_t task, T*) {
      const int64_t r = task / blocks, b = task % blocks;
      for (int64_t k = b * block; k < std::min((b + 1) * block, samples); ++k) {
        const T* x = from + r * size + k * classes() * length;
        to.visit(r, order[r * target_stride + k], length, [factor, x](int64_t f, T& v) { v = factor * x[f]; });
      }
    });
  }

  MixupSide<T> of_run(int64_t r, double weight) const {
    T* slopes = slope.size(1) ? data<T>(slope) + r * size : nullptr;
    return {samples, weight, data<T>(t) + r * size, data<T>(bounds) + r * bounds_size, slopes,
            target.data() + r * target_stride};
  }
};

// The pairs of blocks in rounds: no two of one round share a row block or a column block, so that they may run at once, and every
// sum is formed in the same order whatever the number of threads.
struct Schedule {
  int64_t rows, columns;
  bool symmetric;  // rows and columns are the same blocks: each unordered pair once, a block with itself in round 0

  int64_t even() const { return round_up(rows, 2); }
  int64_t rounds() const { return symmetric ? even() : std::max(rows, columns); }
  int64_t tasks(int64_t round) const { return symmetric && round ? even() / 2 : rows; }

  // The pair of blocks of a task, or {-1, -1}: the circle method, in which one block stays and the others go round.
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

template <typename T>
Tensor loss_of(const Tensor& row, const std::optional<Tensor>& column, const Tensor& row_target,
               const std::optional<Tensor>& column_target, const std::vector<double>& lam,
               const std::vector<double>& lam_weight, const Polynomial& activation, const std::optional<Tensor>& row_grad,
               const std::optional<Tensor>& column_grad) {
  const PairwiseMixupKernels<T>& kernel = kernels<T>();
  const bool symmetric = !column;
  STD_TORCH_CHECK(activation.degree >= 1 && activation.degree <= 16, "degree out of range");
  STD_TORCH_CHECK(lam.size() == lam_weight.size() && row.dim() == 5 && (symmetric || column->dim() == 5), "unexpected shape");
  const int64_t runs = row.size(0), classes = row.size(3), features = row.size(2) * row.size(4);
  for (int d : {0, 2, 3, 4}) STD_TORCH_CHECK(symmetric || row.size(d) == column->size(d), "unexpected shape");
  const int64_t length = round_up(features, kernel.lanes);

  // Two blocks and the slopes of both stay in a core's cache; small problems need several blocks to keep all cores busy.
  const int64_t most = std::max(row.size(1), symmetric ? 0 : column->size(1));
  const int64_t in_cache = (96 << 10) / int64_t(sizeof(T)) / std::max<int64_t>(1, classes * length);
  const int64_t block = round_up(std::clamp<int64_t>(std::min(in_cache, most / 8), 1, 16), kSampleGroup);

  const bool need_grad = row_grad || column_grad;
  Side<T> rows(row, row_target, length, block, need_grad);
  // a mixing weight other than 1/2 tells rows from columns, also where they are the same samples
  std::optional<Side<T>> columns;
  const bool halves = symmetric && std::all_of(lam.begin(), lam.end(), [](double l) { return l == 0.5; });
  if (!halves) columns.emplace(symmetric ? row : *column, symmetric ? row_target : *column_target, length, block, need_grad && !symmetric);

  const Schedule schedule{rows.blocks, halves ? rows.blocks : columns->blocks, symmetric};
  std::vector<double> losses(runs * rows.blocks, 0.0);
  for (size_t k = 0; k < lam.size(); ++k) {
    rows.pack(T(lam[k] / activation.threshold));
    if (columns) columns->pack(T((1 - lam[k]) / activation.threshold));
    auto run_task = [&](int64_t r, int64_t round, int64_t task, T* scratch) {
      const auto [i, j] = schedule(round, task);
      if (i < 0) return;
      PairwiseMixup<T> a{classes, features, length, block, rows.of_run(r, lam[k]), {}, lam_weight[k], activation};
      a.column = columns ? columns->of_run(r, 1 - lam[k]) : a.row;
      if (symmetric) a.column.slope = a.row.slope;
      double& loss = losses[r * rows.blocks + task];
      if (symmetric && lam[k] == 0.5) {
        if (i != j) a.pair_weight *= 2;
        loss += kernel.block_pair(a, i, j, i == j, scratch);
      } else {
        loss += kernel.block_pair(a, i, j, false, scratch);
        if (symmetric && i != j) loss += kernel.block_pair(a, j, i, false, scratch);
      }
    };
    const PairwiseMixup<T> sizes{classes, features, length, block, {}, {}, 0, activation};
    const int64_t scratch_size = kernel.scratch_size(sizes);
    const int64_t work = runs * classes * length * 8 * row.size(1) * (symmetric ? row.size(1) / 2 : column->size(1));
    if (runs >= 8) {  // a network to a thread, in the same order
      for_each_task<T>(runs, work, scratch_size, [&](int64_t r, T* scratch) {
        for (int64_t round = 0; round < schedule.rounds(); ++round) {
          for (int64_t task = 0; task < schedule.tasks(round); ++task) run_task(r, round, task, scratch);
        }
      });
    } else {
      for (int64_t round = 0; round < schedule.rounds(); ++round) {
        const int64_t tasks = schedule.tasks(round);
        for_each_task<T>(runs * tasks, work / schedule.rounds(), scratch_size,
                         [&](int64_t task, T* scratch) { run_task(task / tasks, round, task % tasks, scratch); });
      }
    }
  }

  const T factor = T(activation.scale / activation.threshold);
  if (row_grad) rows.unpack(*row_grad, factor);
  if (column_grad) columns->unpack(*column_grad, factor);
  Tensor loss = empty({runs}, kType<T>);
  for (int64_t r = 0; r < runs; ++r) {
    data<T>(loss)[r] = T(std::accumulate(losses.begin() + r * rows.blocks, losses.begin() + (r + 1) * rows.blocks, 0.0));
  }
  return loss;
}

Tensor pairwise_mixup_loss(Tensor row, std::optional<Tensor> column, Tensor row_target, std::optional<Tensor> column_target,
                           std::vector<double> lam, std::vector<double> lam_weight, int64_t degree, double threshold,
                           double scale, bool lower, bool upper, std::optional<Tensor> row_grad,
                           std::optional<Tensor> column_grad) {
  const Polynomial activation{degree, threshold, scale, lower, upper};
  return row.scalar_type() == ScalarType::Float
             ? loss_of<float>(row, column, row_target, column_target, lam, lam_weight, activation, row_grad, column_grad)
             : loss_of<double>(row, column, row_target, column_target, lam, lam_weight, activation, row_grad, column_grad);
}

}  // namespace
}  // namespace mixfeat

STABLE_TORCH_LIBRARY_FRAGMENT(mixfeat_cpu, m) {
  m.def(
      "pairwise_mixup_loss(Tensor row, Tensor? column, Tensor row_target, Tensor? column_target, float[] lam, "
      "float[] lam_weight, int degree, float threshold, float scale, bool lower, bool upper, Tensor(a!)? row_grad, "
      "Tensor(b!)? column_grad) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mixfeat_cpu, CPU, m) { m.impl("pairwise_mixup_loss", TORCH_BOX(&mixfeat::pairwise_mixup_loss)); }
