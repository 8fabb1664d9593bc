// torch.ops.mixfeat_cpu.pairwise_mixup_loss: orders and packs the samples, divides the pairs into blocks and owns all
// memory. Python has checked the arguments (mixfeat/functional.py, mixfeat/ops). Checks here only guard memory.

#include <array>
#include <numeric>
#include <optional>

#include "all_pairs.h"
#include "library.h"

namespace mixfeat {
namespace {

// to = factor * from, with a stride on either side
template <typename T>
void scale(const T* from, int64_t from_stride, T factor, T* to, int64_t to_stride, int64_t count) {
  int64_t k = 0;
  if (from_stride == 1 && to_stride == 1) {
    for (; k + 4 <= count; k += 4) {  // loads before stores, because compilers do not know that the two cannot overlap
      const T a = from[k], b = from[k + 1], c = from[k + 2], d = from[k + 3];
      to[k] = factor * a;
      to[k + 1] = factor * b;
      to[k + 2] = factor * c;
      to[k + 3] = factor * d;
    }
  }
  for (; k < count; ++k) to[k * to_stride] = factor * from[k * from_stride];
}

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

  // Calls f(filters of one patch and class, their offset in a packed sample, how many) for sample n of run r. The first
  // `negative` filters of a class come first, with all their patches.
  template <typename F>
  void visit(int64_t r, int64_t n, int64_t padded_length, const int64_t* negative, const F& f) const {
    for (int64_t p = 0; p < size[2]; ++p) {
      T* s = data + r * stride[0] + n * stride[1] + p * stride[2];
      for (int64_t c = 0; c < size[3]; ++c) {
        const int64_t first = negative ? negative[c] : 0, rest = size[4] - first;
        if (first) f(s + c * stride[3], c * padded_length + p * first, first);
        f(s + c * stride[3] + first * stride[4], c * padded_length + size[2] * first + p * rest, rest);
      }
    }
  }
};

// How the samples of one side are packed, for one network at a time.
template <typename T>
struct Layout {
  Samples<T> s;
  Order order;
  int64_t samples, classes, length, padded_length, block, blocks, sample_size, size, bounds_size;

  Layout(const Tensor& s, const Tensor& target, int64_t labels, int64_t block)
      : s(s),
        order(target, s.size(0), s.size(1), labels),
        samples(s.size(1)),
        classes(s.size(3)),
        length(s.size(2) * s.size(4)),
        padded_length(round_up(length, typed_kernels<T>().pairwise_mixup_loss.lanes)),
        block(block),
        blocks((samples + block - 1) / block),
        sample_size(classes * padded_length),
        size(round_up(samples, kSampleGroup) * sample_size),
        bounds_size(blocks * 2 * sample_size) {}

  int64_t workspace_size(bool need_grad) const { return size + bounds_size + (need_grad ? size : 0); }
};

// One side of one network's pairs, in a workspace.
template <typename T>
struct Side {
  const Layout<T>& layout;
  int64_t run;
  const int64_t* negative;
  T *t, *bounds, *grad;

  Side(const Layout<T>& layout, int64_t run, const int64_t* negative, bool need_grad, T* workspace)
      : layout(layout),
        run(run),
        negative(negative),
        t(workspace),
        bounds(t + layout.size),
        grad(need_grad ? bounds + layout.bounds_size : nullptr) {
    if (!need_grad) return;
    for_each_block([&](int64_t first, int64_t last) {
      std::fill(grad + first * layout.sample_size, grad + round_up(last, kSampleGroup) * layout.sample_size, T(0));
    });
  }

  const int64_t* index() const { return layout.order.index.data() + run * layout.order.stride; }

  // Calls f(first, last) for the samples of each block.
  template <typename F>
  void for_each_block(const F& f) const {
    for_each_task(layout.blocks, layout.size * 8, 0,
                  [&](int64_t b, void*) { f(b * layout.block, std::min((b + 1) * layout.block, layout.samples)); });
  }

  // t = factor * s, with its bounds if wanted.
  void pack(T factor, bool with_bounds) const {
    for_each_block([&](int64_t first, int64_t last) {
      if (layout.length < layout.padded_length)
        std::fill(t + first * layout.sample_size, t + last * layout.sample_size, T(0));
      std::fill(t + last * layout.sample_size, t + round_up(last, kSampleGroup) * layout.sample_size, T(0));
      for (int64_t k = first; k < last; ++k) {
        T* to = t + k * layout.sample_size;
        layout.s.visit(run, index()[k], layout.padded_length, negative, [&](const T* from, int64_t f, int64_t count) {
          scale(from, layout.s.stride[4], factor, to + f, 1, count);
        });
      }
      if (!with_bounds) return;
      typed_kernels<T>().pairwise_mixup_loss.bounds(t + first * layout.sample_size, last - first, layout.classes,
                                                    layout.length, layout.padded_length,
                                                    bounds + first / layout.block * 2 * layout.sample_size);
    });
  }

  // to = factor * grad
  void unpack(const Samples<T>& to, T factor) const {
    for_each_block([&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        const T* from = grad + k * layout.sample_size;
        to.visit(run, index()[k], layout.padded_length, negative, [&](T* filters, int64_t f, int64_t count) {
          scale(from + f, 1, factor, filters, to.stride[4], count);
        });
      }
    });
  }

  MixupSide<T> with_weight(double weight, double label) const {
    return {layout.samples, weight, label, t, bounds, grad, layout.order.target.data() + run * layout.order.stride};
  }
};

template <typename T>
Tensor loss_of(const Tensor& row, const std::optional<Tensor>& column, const Tensor& row_target,
               const std::optional<Tensor>& column_target, const std::vector<double>& lam,
               const std::vector<double>& lam_weight, const Polynomial& activation,
               const std::optional<Tensor>& row_grad, const std::optional<Tensor>& column_grad,
               const std::vector<double>& label_lam, double label_smoothing, int64_t pairs_that_count,
               const std::optional<Tensor>& readout, const std::optional<Tensor>& readout_grad, bool skip,
               const std::optional<Tensor>& negative_filters) {
  const PairwiseMixupKernels<T>& kernel = typed_kernels<T>().pairwise_mixup_loss;
  const bool symmetric = !column, need_grad = row_grad || column_grad;
  STD_TORCH_CHECK(lam.size() == lam_weight.size() && row.dim() == 5 && (symmetric || column->dim() == 5),
                  "unexpected shape");
  for (int d : {0, 2, 3, 4}) STD_TORCH_CHECK(symmetric || row.size(d) == column->size(d), "unexpected shape");
  for (int d = 0; d < 5; ++d) STD_TORCH_CHECK(!row_grad || row_grad->size(d) == row.size(d), "unexpected shape");
  for (int d = 0; d < 5; ++d)
    STD_TORCH_CHECK(!column_grad || column_grad->size(d) == column->size(d), "unexpected shape");
  const int64_t runs = row.size(0), classes = row.size(3), length = row.size(2) * row.size(4);
  STD_TORCH_CHECK(label_lam.size() == lam.size(), "unexpected shape");
  if (readout) {
    STD_TORCH_CHECK(readout->dim() == 3 && readout->scalar_type() == kType<T> && readout->is_contiguous(),
                    "unexpected readout");
    STD_TORCH_CHECK(readout->size(0) == 1 || readout->size(0) == runs, "unexpected readout");
    STD_TORCH_CHECK(readout->size(1) * readout->size(2) == classes && row.size(4) == 1, "unexpected readout");
  }
  STD_TORCH_CHECK(!readout_grad || (readout && need_grad && readout_grad->numel() == runs * classes &&
                                    readout_grad->is_contiguous() && readout_grad->scalar_type() == kType<T>),
                  "unexpected readout");
  const Negative negative(negative_filters, runs, classes, row.size(4), row.size(2));
  const int64_t labels = readout ? readout->size(1) : classes;

  const int64_t padded_length = round_up(length, kernel.lanes);
  const AllPairs<T> pairs(row.size(1), symmetric ? row.size(1) : column->size(1), symmetric, classes, padded_length, 8);
  const Layout<T> rows(row, row_target, labels, pairs.block);
  // unless every lam is 1/2, rows and columns have different weights even if they are the same samples
  const bool one_side = symmetric && std::all_of(lam.begin(), lam.end(), [](double l) { return l == 0.5; });
  std::optional<Layout<T>> columns;
  if (!one_side)
    columns.emplace(symmetric ? row : *column, symmetric ? row_target : *column_target, labels, pairs.block);
  const bool need_column_grad = need_grad && !symmetric;
  const int64_t row_size = rows.workspace_size(need_grad);
  const int64_t workspace_size = row_size + (columns ? columns->workspace_size(need_column_grad) : 0);

  const int64_t work = pairs.work * int64_t(lam.size());
  PairwiseMixup<T> sizes{classes,
                         length,
                         padded_length,
                         labels,
                         pairs.block,
                         {},
                         {},
                         0,
                         label_smoothing,
                         pairs_that_count == 1 && symmetric,
                         pairs_that_count == 2,
                         nullptr,
                         nullptr,
                         nullptr,
                         activation,
                         skip};
  if (readout) sizes.readout = data<T>(*readout);  // for the size of the scratch memory
  const T factor = T(activation.scale / activation.threshold);
  Tensor loss = empty({runs}, kType<T>);

  // One network, by as many threads as are free.
  auto run_network = [&](int64_t r, void* memory) {
    T* workspace = static_cast<T*>(memory);
    const Side<T> row_side(rows, r, negative.filters(r), need_grad, workspace);
    std::optional<Side<T>> column_side;
    if (columns) column_side.emplace(*columns, r, negative.filters(r), need_column_grad, workspace + row_size);
    std::vector<double> losses(pairs.schedule.rows, 0.0),
        readout_sums(readout_grad ? pairs.schedule.rows * classes : 0);
    for (size_t k = 0; k < lam.size(); ++k) {
      row_side.pack(T(lam[k] / activation.threshold), skip);
      if (column_side) column_side->pack(T((1 - lam[k]) / activation.threshold), skip);
      PairwiseMixup<T> a = sizes;
      // at lam = 1/2 pairs (i, j) and (j, i) are one, with the mean of their labels
      const double label = symmetric && lam[k] == 0.5 ? 0.5 : label_lam[k];
      a.row = row_side.with_weight(lam[k], label);
      a.column = column_side ? column_side->with_weight(1 - lam[k], 1 - label) : a.row;
      if (readout) a.readout = data<T>(*readout) + (readout->size(0) > 1 ? r * classes : 0);
      if (readout_grad) a.readout_grad = readout_sums.data();
      a.negative = negative.pre_activations(r);
      if (symmetric) a.column.grad = a.row.grad;
      pairs.add(a, lam_weight[k], losses.data(), [&](int64_t tasks, int64_t round_work, const auto& f) {
        for_each_task(tasks, round_work, kernel.scratch_bytes(sizes), f);
      });
    }
    data<T>(loss)[r] = T(std::accumulate(losses.begin(), losses.end(), 0.0));
    if (row_grad) row_side.unpack(Samples<T>(*row_grad), factor);
    if (column_grad) column_side->unpack(Samples<T>(*column_grad), factor);
    for (int64_t f = 0; readout_grad && f < classes; ++f) {
      double sum = 0;
      for (int64_t k = 0; k < pairs.schedule.rows; ++k) sum += readout_sums[k * classes + f];
      data<T>(*readout_grad)[r * classes + f] = T(sum);
    }
  };

  // One thread per network, if that keeps all threads busy: parallel loops inside then run on that one thread. The
  // order of sums is the same.
  const int64_t threads = torch::stable::get_num_threads(), turns = (runs + threads - 1) / threads;
  if (5 * runs >= 4 * turns * threads) {
    for_each_task(runs, runs * work, workspace_size * sizeof(T), run_network);
  } else {
    const Tensor workspace = empty({workspace_size}, kType<T>);
    for (int64_t r = 0; r < runs; ++r) run_network(r, data<T>(workspace));
  }
  return loss;
}

Tensor pairwise_mixup_loss(Tensor row, std::optional<Tensor> column, Tensor row_target,
                           std::optional<Tensor> column_target, std::vector<double> lam, std::vector<double> lam_weight,
                           std::vector<double> activation, std::optional<Tensor> row_grad,
                           std::optional<Tensor> column_grad, std::vector<double> label_lam, double label_smoothing,
                           int64_t pairs_that_count, std::optional<Tensor> readout, std::optional<Tensor> readout_grad,
                           bool skip, std::optional<Tensor> negative_filters) {
  const auto f = row.scalar_type() == ScalarType::Float ? loss_of<float> : loss_of<double>;
  return f(row, column, row_target, column_target, lam, lam_weight, polynomial_of(activation), row_grad, column_grad,
           label_lam, label_smoothing, pairs_that_count, readout, readout_grad, skip, negative_filters);
}

}  // namespace
}  // namespace mixfeat

STABLE_TORCH_LIBRARY_FRAGMENT(mixfeat_cpu, m) {
  m.def(
      "pairwise_mixup_loss(Tensor row, Tensor? column, Tensor row_target, Tensor? column_target, float[] lam, "
      "float[] lam_weight, float[] activation, Tensor(a!)? row_grad, Tensor(b!)? column_grad, float[] label_lam, "
      "float label_smoothing, int pairs_that_count, Tensor? readout, Tensor(c!)? readout_grad, bool skip=True, "
      "Tensor? negative_filters=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mixfeat_cpu, CPU, m) {
  m.impl("pairwise_mixup_loss", TORCH_BOX(&mixfeat::pairwise_mixup_loss));
}
