// torch.ops.mixfeat_cpu.gradient_descent: whole runs of full-batch gradient descent. Everything of a network stays
// packed between its steps. Python has checked the arguments (mixfeat/functional.py, mixfeat/ops). Checks here only
// guard memory.

#include <mutex>
#include <numeric>
#include <optional>

#include "all_pairs.h"
#include "library.h"
#include "scratch.h"

namespace mixfeat {
namespace {

// What all networks have in common.
template <typename T>
struct Problem {
  const GradientDescentKernels<T>& kernel = typed_kernels<T>().gradient_descent;
  const PairwiseMixupKernels<T>& pair_kernel = typed_kernels<T>().pairwise_mixup_loss;

  int64_t samples, patches, patch_dim, classes, filters;  // N, P, D, C, C*M
  std::vector<double> lam, lam_weight, label_lam;          // none: plain cross-entropy
  double label_smoothing;
  int64_t pairs_that_count;  // 0: all, 1: distinct, 2: different classes
  Polynomial activation;
  T momentum, weight_decay;
  bool one_side;          // every lam is 1/2, so rows are columns
  int64_t padded_samples, padded_length, columns;
  AllPairs<T> pairs;

  Problem(int64_t samples, int64_t patches, int64_t patch_dim, int64_t classes, int64_t filters_per_class,
          const std::vector<double>& lam, const std::vector<double>& lam_weight, const std::vector<double>& label_lam,
          double label_smoothing, int64_t pairs_that_count, const Polynomial& activation, T momentum, T weight_decay)
      : samples(samples),
        patches(patches),
        patch_dim(patch_dim),
        classes(classes),
        filters(classes * filters_per_class),
        lam(lam),
        lam_weight(lam_weight),
        label_lam(label_lam),
        label_smoothing(label_smoothing),
        pairs_that_count(pairs_that_count),
        activation(activation),
        momentum(momentum),
        weight_decay(weight_decay),
        one_side(std::all_of(lam.begin(), lam.end(), [](double l) { return l == 0.5; })),
        padded_samples(round_up(samples, plain() ? kernel.lanes : kSampleGroup)),
        padded_length(round_up(patches * filters_per_class, kernel.lanes)),
        columns(round_up(padded_samples * patches, kernel.lanes)),
        pairs(samples, samples, true, classes, padded_length, 2) {}

  bool plain() const { return lam.empty(); }
  int64_t sample_size() const { return classes * padded_length; }
  int64_t blocks() const { return plain() ? padded_samples / kernel.lanes : pairs.row_blocks; }
  int64_t product_work() const { return columns * filters * patch_dim; }

  // multiply-adds of a step
  int64_t work() const {
    const int64_t loss = plain() ? columns * filters * 16 : pairs.work * int64_t(lam.size());
    return 2 * product_work() + loss;
  }

  PairwiseMixup<T> pair_sizes() const {
    return {classes,
            filters / classes * patches,
            padded_length,
            classes,
            pairs.block,
            {},
            {},
            0,
            label_smoothing,
            pairs_that_count == 1,
            pairs_that_count == 2,
            nullptr,
            nullptr,
            nullptr,
            activation,
            true};
  }

  // How many ordered pairs count, for sorted targets.
  double pair_count(const int64_t* target) const {
    double same = 0;
    for (int64_t n = 0, first = 0; n < samples && pairs_that_count == 2; ++n) {
      if (target[n] != target[first]) first = n;
      same += n == first ? 1 : 2 * (n - first) + 1;
    }
    return std::max(1.0, double(samples) * samples - (pairs_that_count == 1 ? samples : same));
  }

  // The column of sample n's first patch, and the distance of its patches.
  int64_t column(int64_t n) const {
    return plain() ? n / kernel.lanes * kernel.lanes * patches + n % kernel.lanes : n * patches;
  }
  int64_t patch_distance() const { return plain() ? kernel.lanes : 1; }
};

// One network, in a workspace.
template <typename T>
struct Network {
  const Problem<T>& problem;
  Scratch scratch;
  T *input, *weight, *grad, *s;
  std::array<T*, 2> t, bounds;  // rows, and columns where they differ
  T* t_grad;
  double* losses;
  double pair_count;
  const int64_t* negative;  // (C,) pre-activations, or null
  GradientDescent<T> view;

  Network(const Problem<T>& p, void* memory)
      : problem(p),
        scratch(memory),
        input(scratch.take<T>(round_up(p.patch_dim, 4) * p.columns)),
        weight(scratch.take<T>(round_up(p.filters, 4) * p.patch_dim)),
        grad(scratch.take<T>(p.filters * p.patch_dim)),
        s(scratch.take<T>(round_up(p.filters, 4) * p.columns + p.kernel.lanes)),
        t{},
        bounds{},
        t_grad(nullptr),
        losses(scratch.take<double>(std::max(p.blocks(), p.pairs.schedule.rows))) {
    for (int side = 0; !p.plain() && side < (p.one_side ? 1 : 2); ++side) {
      t[side] = scratch.take<T>(p.padded_samples * p.sample_size());
      bounds[side] = scratch.take<T>(p.blocks() * 2 * p.sample_size());
    }
    if (!p.plain()) t_grad = scratch.take<T>(p.padded_samples * p.sample_size() + p.kernel.lanes);
  }

  // Takes in the samples x (N, P, D) in their order, and the weight.
  void load(const T* x, const int64_t* stride, const int64_t* index, const int64_t* target, const T* initial,
            T* momentum_buffer, const int64_t* negative_filters, const int64_t* negative) {
    const Problem<T>& p = problem;
    pair_count = p.pair_count(target);
    this->negative = negative;
    std::fill_n(static_cast<char*>(static_cast<void*>(input)), scratch.bytes(), 0);
    for (int64_t k = 0; k < p.samples; ++k) {
      for (int64_t patch = 0; patch < p.patches; ++patch) {
        const T* from = x + index[k] * stride[0] + patch * stride[1];
        T* to = input + p.column(k) + patch * p.patch_distance();
        for (int64_t d = 0; d < p.patch_dim; ++d) to[d * p.columns] = from[d * stride[2]];
      }
    }
    std::copy_n(initial, p.filters * p.patch_dim, weight);
    view = {p.samples,         p.patches,       p.patch_dim, p.classes, p.filters,       p.columns, p.padded_length,
            p.activation,      input,           target,      weight,    momentum_buffer, grad,      s,
            p.label_smoothing, negative_filters};
  }

  // Returns the loss before the step.
  double step(T lr, const Team& team) {
    const Problem<T>& p = problem;
    const int64_t rows = 4 * 3;  // filters of a task
    const double loss = p.plain() ? cross_entropy(team) : all_pairs(team);
    team((p.filters + rows - 1) / rows, p.product_work(), [&](int64_t k, void*) {
      p.kernel.weight_gradient(view, k * rows, std::min((k + 1) * rows, p.filters));
    });
    p.kernel.update(view, lr, p.momentum, p.weight_decay);
    return loss;
  }

  void convolve(const Team& team) {
    const int64_t panel = problem.kernel.panel;
    team((problem.columns + panel - 1) / panel, problem.product_work(), [&](int64_t k, void*) {
      problem.kernel.convolve(view, k * panel, std::min((k + 1) * panel, problem.columns));
    });
  }

  double cross_entropy(const Team& team) {
    convolve(team);
    team(problem.blocks(), problem.columns * problem.filters * 16,
         [&](int64_t block, void* scratch) { losses[block] = problem.kernel.cross_entropy(view, block, scratch); });
    return std::accumulate(losses, losses + problem.blocks(), 0.0);
  }

  double all_pairs(const Team& team) {
    const Problem<T>& p = problem;
    const auto for_each_block = [&](const auto& f) {  // samples, padding included
      team(p.blocks(), p.padded_samples * p.sample_size() * 8, [&](int64_t block, void*) {
        f(block, block * p.pairs.block, std::min((block + 1) * p.pairs.block, p.padded_samples));
      });
    };
    // On one thread a block is convolved when it is packed, and stays in the first-level cache.
    const bool alone = team.threads == 1;
    if (!alone) convolve(team);
    PairwiseMixup<T> a = p.pair_sizes();
    a.negative = negative;
    const auto pack = [&](int side, double weight, double label, bool convolves) {
      for_each_block([&](int64_t block, int64_t begin, int64_t end) {
        if (convolves) {
          const int64_t lanes = p.kernel.lanes, first = begin * p.patches / lanes * lanes;
          p.kernel.convolve(view, first, round_up(end * p.patches, lanes));
        }
        T* first = t[side] + begin * p.sample_size();
        p.kernel.pack(view, T(weight / p.activation.threshold), begin, end, t[side]);
        p.pair_kernel.bounds(first, std::min(end, p.samples) - begin, p.classes, a.length, p.padded_length,
                             bounds[side] + block * 2 * p.sample_size());
      });
      return MixupSide<T>{p.samples, weight, label, t[side], bounds[side], t_grad, view.target};
    };
    for_each_block([&](int64_t, int64_t begin, int64_t end) {
      std::fill(t_grad + begin * p.sample_size(), t_grad + end * p.sample_size(), T(0));
    });
    std::fill_n(losses, p.pairs.schedule.rows, 0.0);
    for (size_t k = 0; k < p.lam.size(); ++k) {
      const double label = p.lam[k] == 0.5 ? 0.5 : p.label_lam[k];  // as in pairwise_mixup_loss.cpp
      a.row = pack(0, p.lam[k], label, alone && k == 0);
      a.column = p.one_side ? a.row : pack(1, 1 - p.lam[k], 1 - label, false);
      p.pairs.add(a, p.lam_weight[k] / pair_count, losses, team);
    }
    for_each_block([&](int64_t, int64_t begin, int64_t end) {
      p.kernel.unpack(view, T(p.activation.scale / p.activation.threshold), begin, end, t_grad);
    });
    return std::accumulate(losses, losses + p.pairs.schedule.rows, 0.0);
  }
};

// Networks that wait for a thread, first come first served. A thread that finds none can stop: the others have theirs.
class Queue {
 public:
  explicit Queue(int64_t size) : ring_(size), count_(size) { std::iota(ring_.begin(), ring_.end(), 0); }

  int64_t pop() {  // -1: none
    const std::lock_guard<std::mutex> lock(mutex_);
    if (count_ == 0) return -1;
    const int64_t network = ring_[first_];
    first_ = (first_ + 1) % int64_t(ring_.size());
    --count_;
    return network;
  }

  void push(int64_t network) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ring_[(first_ + count_++) % int64_t(ring_.size())] = network;
  }

 private:
  std::mutex mutex_;
  std::vector<int64_t> ring_;
  int64_t first_ = 0, count_;
};

template <typename T>
Tensor descend(const Tensor& input, Tensor& weight, const Tensor& target, const std::vector<double>& lam,
               const std::vector<double>& lam_weight, const std::vector<double>& label_lam, double label_smoothing,
               int64_t pairs_that_count, const Polynomial& activation, const Tensor& lr, int64_t steps, double momentum,
               double weight_decay, Tensor& momentum_buffer, const std::optional<Tensor>& negative_filters) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.is_contiguous() && weight.scalar_type() == kType<T>, "unexpected weight");
  STD_TORCH_CHECK((input.dim() == 3 || input.dim() == 4) && input.scalar_type() == kType<T>, "unexpected input");
  const int64_t runs = weight.size(0), data_dim = input.dim() - 3,
                network_size = weight.size(1) * weight.size(2) * weight.size(3);
  STD_TORCH_CHECK((data_dim == 0 || input.size(0) == runs) && input.size(data_dim + 2) == weight.size(3),
                  "unexpected shape");
  STD_TORCH_CHECK(momentum == 0 || (momentum_buffer.numel() == weight.numel() && momentum_buffer.is_contiguous()),
                  "unexpected shape");
  STD_TORCH_CHECK(lr.dim() == 2 && lr.scalar_type() == ScalarType::Double, "unexpected lr");
  for (int d = 0; d < 2; ++d) STD_TORCH_CHECK(lr.size(d) == 1 || lr.size(d) == (d ? steps : runs), "unexpected shape");
  STD_TORCH_CHECK(lam.size() == lam_weight.size() && lam.size() == label_lam.size(), "unexpected nodes");
  const int64_t samples = input.size(data_dim);
  const Problem<T> problem(samples, input.size(data_dim + 1), input.size(data_dim + 2), weight.size(1), weight.size(2),
                           lam, lam_weight, label_lam, label_smoothing, pairs_that_count, activation, T(momentum),
                           T(weight_decay));
  const Negative negative(negative_filters, runs, problem.classes, weight.size(2), problem.patches);
  const Order order(target, runs, samples, problem.classes);
  const int64_t stride[] = {input.stride(data_dim), input.stride(data_dim + 1), input.stride(data_dim + 2)};
  const int64_t lr_stride[] = {lr.size(0) == 1 ? 0 : lr.stride(0), lr.size(1) == 1 ? 0 : lr.stride(1)};
  Tensor loss = empty({runs, steps}, kType<T>);

  // Steps [first, last) of network r.
  const auto run = [&](int64_t r, int64_t first, int64_t last, void* workspace, const Team& team) {
    Network<T> network(problem, workspace);
    T* w = data<T>(weight) + r * network_size;
    network.load(data<T>(input) + (data_dim ? r * input.stride(0) : 0), stride, order.index.data() + r * order.stride,
                 order.target.data() + r * order.stride, w,
                 momentum == 0 ? nullptr : data<T>(momentum_buffer) + r * network_size, negative.filters(r),
                 negative.pre_activations(r));
    for (int64_t step = first; step < last; ++step) {
      const T rate = T(data<double>(lr)[r * lr_stride[0] + step * lr_stride[1]]);
      data<T>(loss)[r * steps + step] = T(network.step(rate, team));
    }
    std::copy_n(network.weight, network_size, w);
  };

  const int64_t workspace_bytes = Network<T>(problem, nullptr).scratch.bytes();
  const int64_t scratch_bytes =
      round_up(std::max(problem.pair_kernel.scratch_bytes(problem.pair_sizes()),
                        problem.kernel.cross_entropy_scratch_bytes({0, 0, 0, problem.classes})),
               64);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t rounds =
      problem.plain() ? 1 : std::max<int64_t>(1, problem.pairs.schedule.rounds() * int64_t(lam.size()));
  // threads of use inside a network
  const int64_t inside = std::clamp<int64_t>((problem.work() / rounds) >> 22, 1, threads);
  if (inside > runs) {
    // Few large networks: one after the other, each by all threads.
    const Tensor memory = empty({workspace_bytes + threads * scratch_bytes}, ScalarType::Byte);
    char* base = data<char>(memory);
    for (int64_t r = 0; r < runs; ++r) run(r, 0, steps, base, Team{threads, base + workspace_bytes, scratch_bytes});
    return loss;
  }
  // A thread takes one network for a turn of many steps, some 10 ms, and then the one that has waited longest. So all
  // threads end within a turn of each other, also if some networks take longer, or some threads are held up.
  const int64_t turn = std::max<int64_t>(1, (int64_t(1) << 28) / std::max<int64_t>(1, problem.work()));
  const int64_t workers = std::min(runs, threads);
  const Tensor memory = empty({workers, workspace_bytes + scratch_bytes}, ScalarType::Byte);
  std::vector<int64_t> done(runs, 0);
  Queue queue(steps ? runs : 0);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      char* workspace = data<char>(memory) + worker * (workspace_bytes + scratch_bytes);
      for (int64_t r = queue.pop(); r >= 0; r = queue.pop()) {
        const int64_t last = std::min(done[r] + turn, steps);
        run(r, done[r], last, workspace, Team{1, workspace + workspace_bytes, scratch_bytes});
        done[r] = last;
        if (last < steps) queue.push(r);
      }
    }
  });
  return loss;
}

// Updates weight (R, C, M, D) and momentum_buffer, of the same shape, in place; returns the loss (R, steps).
Tensor gradient_descent(Tensor input, Tensor weight, Tensor target, std::vector<double> lam,
                        std::vector<double> lam_weight, std::vector<double> label_lam, double label_smoothing,
                        int64_t pairs_that_count, std::vector<double> activation, Tensor lr, int64_t steps,
                        double momentum, double weight_decay, Tensor momentum_buffer,
                        std::optional<Tensor> negative_filters) {
  const auto f = input.scalar_type() == ScalarType::Float ? descend<float> : descend<double>;
  return f(input, weight, target, lam, lam_weight, label_lam, label_smoothing, pairs_that_count,
           polynomial_of(activation), lr, steps, momentum, weight_decay, momentum_buffer, negative_filters);
}

}  // namespace
}  // namespace mixfeat

STABLE_TORCH_LIBRARY_FRAGMENT(mixfeat_cpu, m) {
  m.def(
      "gradient_descent(Tensor input, Tensor(a!) weight, Tensor target, float[] lam, float[] lam_weight, "
      "float[] label_lam, float label_smoothing, int pairs_that_count, float[] activation, Tensor lr, int steps, "
      "float momentum, float weight_decay, Tensor(b!) momentum_buffer, Tensor? negative_filters) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mixfeat_cpu, CPU, m) { m.impl("gradient_descent", TORCH_BOX(&mixfeat::gradient_descent)); }
