// torch.ops.mixfeat_cpu.mixup_binary_cross_entropy: divides the work into tasks and owns all memory. Python has checked
// the arguments (mixfeat/functional.py, mixfeat/ops), except the values of targets and lam.

#include <optional>
#include <tuple>

#include "library.h"

namespace mixfeat {
namespace {

template <typename T>
std::tuple<Tensor, Tensor> rows(const Tensor& input, const Tensor& target_a, const Tensor& target_b, const Tensor& lam,
                                const std::optional<Tensor>& pos_weight, double label_smoothing,
                                std::optional<double> threshold, double scale, bool reduce, bool need_grad) {
  const int64_t samples = input.size(0), classes = input.size(1), stride = input.stride(0),
                width = input.element_size();
  STD_TORCH_CHECK(input.dim() == 2 && (samples == 0 || classes <= 1 || input.stride(1) == 1), "unexpected layout");
  STD_TORCH_CHECK(lam.scalar_type() == kType<T> && (lam.dim() == 0 || lam.size(0) == samples), "unexpected lam");
  STD_TORCH_CHECK(all_fractions(lam), "unexpected lam");
  for (const Tensor* target : {&target_a, &target_b}) {
    STD_TORCH_CHECK(target->is_contiguous() && target->numel() == samples && all_within(*target, classes),
                    "unexpected target");
  }
  const T* weight = nullptr;
  if (pos_weight) {
    STD_TORCH_CHECK(
        pos_weight->scalar_type() == kType<T> && pos_weight->is_contiguous() && pos_weight->numel() == classes,
        "unexpected pos_weight");
    weight = data<T>(*pos_weight);
  }
  const BinaryCrossEntropy compute = kernels().binary_cross_entropy(element_of(input.scalar_type()));
  STD_TORCH_CHECK(compute, "unexpected dtype");
  const std::vector<int64_t> none{0};
  const Tensor grad = empty_large(need_grad ? shape_of(input) : none, input.scalar_type());
  const Tensor losses = reduce ? empty({samples}, kType<T>) : empty_large(shape_of(input), kType<T>);
  const char* from = data<char>(input);
  const int64_t *a = data<int64_t>(target_a), *b = data<int64_t>(target_b);
  const T* lams = data<T>(lam);
  const int64_t lam_stride = lam.dim() ? lam.stride(0) : 0;
  char* to = data<char>(grad);
  T* loss = data<T>(losses);
  constexpr int64_t kWorkPerLogit = 24;  // in multiply-adds
  for_each_task(samples, samples * classes * kWorkPerLogit, 0, [&](int64_t n, void*) {
    // As plain PyTorch forms them in T: a threshold must fall on the same side.
    const T lam_n = lams[n * lam_stride], one_minus_eps = T(1 - label_smoothing),
            eps_share = T(label_smoothing / classes);
    const T share_a = a[n] == b[n] ? lam_n + (1 - lam_n) : lam_n, share_b = a[n] == b[n] ? share_a : 1 - lam_n;
    const auto label_of = [&](T share) {
      const T q = one_minus_eps * share + eps_share;
      return threshold ? double(q > *threshold) : double(q);
    };
    const BinaryLabel label{label_of(0), {a[n], b[n]}, {label_of(share_a), label_of(share_b)}};
    const double sum = compute(from + n * stride * width, classes, label, weight, scale,
                               reduce ? nullptr : loss + n * classes, need_grad ? to + n * classes * width : nullptr);
    if (reduce) loss[n] = sum;
  });
  if (!reduce) return {losses, grad};
  double sum = 0;
  for (int64_t n = 0; n < samples; ++n) sum += loss[n];
  const Tensor total = empty({}, kType<T>);
  *data<T>(total) = sum;
  return {total, grad};
}

std::tuple<Tensor, Tensor> mixup_binary_cross_entropy(Tensor input, Tensor target_a, Tensor target_b, Tensor lam,
                                                      std::optional<Tensor> pos_weight, double label_smoothing,
                                                      std::optional<double> threshold, double scale, bool reduce,
                                                      bool need_grad) {
  const auto f = input.scalar_type() == ScalarType::Double ? rows<double> : rows<float>;
  return f(input, target_a, target_b, lam, pos_weight, label_smoothing, threshold, scale, reduce, need_grad);
}

}  // namespace
}  // namespace mixfeat

STABLE_TORCH_LIBRARY_FRAGMENT(mixfeat_cpu, m) {
  m.def(
      "mixup_binary_cross_entropy(Tensor input, Tensor target_a, Tensor target_b, Tensor lam, Tensor? pos_weight, "
      "float label_smoothing, float? threshold, float scale, bool reduce, bool need_grad) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mixfeat_cpu, CPU, m) {
  m.impl("mixup_binary_cross_entropy", TORCH_BOX(&mixfeat::mixup_binary_cross_entropy));
}
