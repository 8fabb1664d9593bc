// torch.ops.mixfeat_cpu.mixup_cross_entropy and soft_target_cross_entropy: divide the work into tasks and own all
// memory. Python has checked the arguments (mixfeat/functional.py, mixfeat/ops), except the values of targets and lam.

#include <limits>
#include <optional>
#include <tuple>

#include "library.h"

namespace mixfeat {
namespace {

constexpr Element kNoTarget = Element::kByte;

// Losses, gradients and, if wanted, logsumexps of all rows. label_of(n, label) fills in the weights of the classes; it
// returns false for a row that does not count, whose loss and gradient are then 0, whatever its logits.
template <typename T, typename F>
std::tuple<Tensor, Tensor, Tensor> rows(const Tensor& input, Element target, bool reduce, bool need_lse, bool need_grad,
                                        const F& label_of) {
  const int64_t samples = input.size(0), classes = input.size(1), stride = input.stride(0),
                width = input.element_size();
  STD_TORCH_CHECK(input.dim() == 2 && (samples == 0 || classes <= 1 || input.stride(1) == 1), "unexpected layout");
  const Element element = element_of(input.scalar_type());
  const CrossEntropy compute = kernels().cross_entropy(element, target);
  STD_TORCH_CHECK(compute, "unexpected dtype");
  const std::vector<int64_t> none{0};
  const Tensor grad = empty_large(need_grad ? shape_of(input) : none, input.scalar_type());
  const Tensor losses = reduce ? empty({}, kType<T>) : empty({samples}, kType<T>);
  const Tensor lses = empty({need_lse ? samples : 0}, kType<T>);
  std::vector<T> to_reduce(reduce ? samples : 0);
  const char* from = data<char>(input);
  char* to = data<char>(grad);
  T *loss = reduce ? to_reduce.data() : data<T>(losses), *lse = data<T>(lses);
  constexpr int64_t kWorkPerLogit = 16;  // in multiply-adds
  const bool narrow = width < int64_t(sizeof(T));
  const int64_t scratch_bytes = narrow && need_grad ? classes * sizeof(T) : 0;
  for_each_task(samples, samples * classes * kWorkPerLogit, scratch_bytes, [&](int64_t n, void* scratch) {
    Label label;
    char* row_grad = need_grad ? to + n * classes * width : nullptr;
    const bool counts = label_of(n, label);
    if (counts || need_lse) {
      const LossAndLse row = compute(from + n * stride * width, classes, label, scratch, counts ? row_grad : nullptr);
      loss[n] = row.loss;
      if (need_lse) lse[n] = row.lse;
    }
    if (!counts) {
      loss[n] = 0;
      if (need_grad) std::fill(row_grad, row_grad + classes * width, 0);
    }
  });
  if (!reduce) return {losses, lses, grad};
  double sum = 0;
  for (int64_t n = 0; n < samples; ++n) sum += loss[n];
  *data<T>(losses) = sum;
  return {losses, lses, grad};
}

// The upstream gradients of a backward pass: `loss`, () or (N,), of each row's loss, and `lse`, (N,), of its logsumexp.
struct Upstream {
  const std::optional<Tensor>&loss, &lse;
};

template <typename T>
const T* numbers(const std::optional<Tensor>& tensor, int64_t samples) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == kType<T> && (tensor->dim() == 0 || tensor->size(0) == samples),
                  "unexpected gradient");
  return data<T>(*tensor);
}

int64_t stride_of(const std::optional<Tensor>& tensor) { return tensor && tensor->dim() ? tensor->stride(0) : 0; }

template <typename T>
std::tuple<Tensor, Tensor, Tensor, int64_t> mixup_cross_entropy(const Tensor& input, const Tensor (&targets)[2],
                                                                const Tensor& lam, double label_smoothing,
                                                                double lse_square_scale, int64_t ignore_index,
                                                                bool mean, bool fold, bool reduce, bool need_lse,
                                                                bool need_grad, Upstream upstream) {
  const int64_t samples = input.size(0), classes = input.size(1);
  STD_TORCH_CHECK(lam.scalar_type() == kType<T> && (lam.dim() == 0 || lam.size(0) == samples), "unexpected lam");
  STD_TORCH_CHECK(all_fractions(lam), "unexpected lam");
  const T* lams = data<T>(lam);
  const int64_t lam_stride = lam.dim() ? lam.stride(0) : 0;
  const T *loss_grad = numbers<T>(upstream.loss, samples), *lse_grad = numbers<T>(upstream.lse, samples);
  const int64_t loss_stride = stride_of(upstream.loss), lse_stride = stride_of(upstream.lse);
  const int64_t* target[2];
  int64_t counts[2] = {0, 0};
  for (int j = 0; j < 2; ++j) {
    STD_TORCH_CHECK(targets[j].is_contiguous() && targets[j].numel() == samples, "unexpected target");
    target[j] = data<int64_t>(targets[j]);
    for (int64_t n = 0; n < samples; ++n) {
      const int64_t c = target[j][n];
      if (c == ignore_index) continue;
      if (c < 0 || c >= classes) {
        const Tensor none = empty({0}, kType<T>);
        return {none, none, none, 2 * n + j};
      }
      ++counts[j];
    }
  }
  double scales[2];
  for (int j = 0; j < 2; ++j) scales[j] = mean && counts[j] ? (fold ? 1.0 : double(samples)) / counts[j] : 1.0;
  auto [loss, lse, grad] = rows<T>(input, kNoTarget, reduce, need_lse, need_grad, [&](int64_t n, Label& label) {
    const double lam_n = lams[n * lam_stride], shares[] = {lam_n, 1 - lam_n};
    const double factor = loss_grad ? loss_grad[n * loss_stride] : 1;
    double total = 0;
    for (int j = 0; j < 2; ++j) {
      const double weight = factor * scales[j] * shares[j];
      if (target[j][n] == ignore_index || weight == 0) continue;
      label.classes[j] = target[j][n];
      label.values[j] = weight * (1 - label_smoothing);
      total += weight;
    }
    label.base = total * label_smoothing / classes;
    label.lse = lse_grad ? lse_grad[n * lse_stride] : 0;
    label.lse_square = total * lse_square_scale;
    return total != 0 || label.lse != 0;
  });
  if (mean && !(counts[0] && counts[1])) *data<T>(loss) = std::numeric_limits<T>::quiet_NaN();
  return {loss, lse, grad, -1};
}

std::tuple<Tensor, Tensor, Tensor, int64_t> mixup_cross_entropy_of(Tensor input, Tensor target_a, Tensor target_b,
                                                                   Tensor lam, double label_smoothing,
                                                                   double lse_square_scale, int64_t ignore_index,
                                                                   bool mean, bool fold, bool reduce, bool need_lse,
                                                                   bool need_grad, std::optional<Tensor> loss_grad,
                                                                   std::optional<Tensor> lse_grad) {
  const auto f = input.scalar_type() == ScalarType::Double ? mixup_cross_entropy<double> : mixup_cross_entropy<float>;
  return f(input, {target_a, target_b}, lam, label_smoothing, lse_square_scale, ignore_index, mean, fold, reduce,
           need_lse, need_grad, {loss_grad, lse_grad});
}

template <typename T>
std::tuple<Tensor, Tensor> soft_target_cross_entropy(const Tensor& input, const Tensor& target, double weight,
                                                     double label_smoothing, bool reduce, bool need_grad) {
  const int64_t classes = input.size(1), stride = target.stride(0), width = target.element_size();
  STD_TORCH_CHECK(target.dim() == 2 && target.size(0) == input.size(0) && target.size(1) == classes,
                  "unexpected target");
  STD_TORCH_CHECK(target.numel() == 0 || classes <= 1 || target.stride(1) == 1, "unexpected layout");
  const char* from = data<char>(target);
  const auto label_of = [&](int64_t n, Label& label) {
    label.base = weight * label_smoothing / classes;
    label.target = from + n * stride * width;
    label.scale = weight * (1 - label_smoothing);
    return true;
  };
  auto [loss, lse, grad] = rows<T>(input, element_of(target.scalar_type()), reduce, false, need_grad, label_of);
  return {loss, grad};
}

std::tuple<Tensor, Tensor> soft_target_cross_entropy_of(Tensor input, Tensor target, double weight,
                                                        double label_smoothing, bool reduce, bool need_grad) {
  const auto f =
      input.scalar_type() == ScalarType::Double ? soft_target_cross_entropy<double> : soft_target_cross_entropy<float>;
  return f(input, target, weight, label_smoothing, reduce, need_grad);
}

}  // namespace
}  // namespace mixfeat

STABLE_TORCH_LIBRARY_FRAGMENT(mixfeat_cpu, m) {
  m.def(
      "mixup_cross_entropy(Tensor input, Tensor target_a, Tensor target_b, Tensor lam, float label_smoothing, "
      "float lse_square_scale, int ignore_index, bool mean, bool fold, bool reduce, bool need_lse, bool need_grad, "
      "Tensor? loss_grad, Tensor? lse_grad) -> (Tensor, Tensor, Tensor, int)");
  m.def(
      "soft_target_cross_entropy(Tensor input, Tensor target, float weight, float label_smoothing, bool reduce, "
      "bool need_grad) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mixfeat_cpu, CPU, m) {
  m.impl("mixup_cross_entropy", TORCH_BOX(&mixfeat::mixup_cross_entropy_of));
  m.impl("soft_target_cross_entropy", TORCH_BOX(&mixfeat::soft_target_cross_entropy_of));
}
