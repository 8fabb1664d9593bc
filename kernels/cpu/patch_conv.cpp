// torch.ops.mixfeat_cpu.patch_conv and its backward pass: divide the work into tasks and own all memory. Python has
// checked the arguments (mixfeat/functional.py, mixfeat/ops). Checks here only guard memory.

#include <optional>
#include <tuple>

#include "library.h"
#include "mixup.h"

namespace mixfeat {
namespace {

// The networks of a call, as `size` descriptors whose data differ: input (N, P, D) and weight (C, M, D), either with a
// leading run dimension. Runs that share the data go into one descriptor, and so into one matrix product.
template <typename E>
struct Batch {
  PatchConv<E> first;
  int64_t size, input_stride, weight_stride;
  std::vector<int64_t> logits_shape;

  Batch(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& index, const std::optional<Tensor>& lam,
        const Polynomial& activation) {
    const auto x = input.sizes(), x_stride = input.strides(), w = weight.sizes();
    const bool input_runs = x.size() == 4, weight_runs = w.size() == 4;
    STD_TORCH_CHECK((input_runs || x.size() == 3) && (weight_runs || w.size() == 3), "unexpected shape");
    const size_t i = input_runs, j = weight_runs;
    STD_TORCH_CHECK(x[i + 2] == w[j + 2] && (!input_runs || !weight_runs || x[0] == w[0]), "unexpected shape");
    STD_TORCH_CHECK((input.numel() == 0 || x[i + 2] <= 1 || x_stride[i + 2] == 1) && weight.is_contiguous(),
                    "unexpected layout");
    STD_TORCH_CHECK(input.scalar_type() == kType<E> && weight.scalar_type() == kType<E>, "unexpected dtype");
    STD_TORCH_CHECK(!index || (lam && lam->scalar_type() == kType<Compute<E>> && index->is_contiguous()),
                    "unexpected mixing");
    STD_TORCH_CHECK(!index || (all_within(*index, index->numel()) && all_fractions(*lam)), "unexpected mixing");
    first.samples = x[i];
    first.patches = x[i + 1];
    first.patch_dim = x[i + 2];
    first.runs = weight_runs && !input_runs ? w[0] : 1;
    first.classes = w[j];
    first.filters = w[j + 1];
    first.columns = first.runs * first.classes * first.filters;
    first.input = data<E>(input);
    first.sample_stride = x_stride[i];
    first.patch_stride = x_stride[i + 1];
    first.index = index ? data<int64_t>(*index) : nullptr;
    first.lam = lam ? data<Compute<E>>(*lam) : nullptr;
    first.lam_stride = lam && lam->dim() ? lam->stride(0) : 0;
    first.activation = activation;
    size = input_runs ? x[0] : 1;
    input_stride = input_runs ? x_stride[0] : 0;
    weight_stride = input_runs && weight_runs ? first.columns * first.patch_dim : 0;
    if (input_runs || weight_runs) logits_shape.push_back(size * first.runs);
    logits_shape.insert(logits_shape.end(), {first.samples, first.classes});
  }

  // How many weights differ among the descriptors.
  int64_t weights() const { return weight_stride ? size : std::min<int64_t>(size, 1); }

  PatchConv<E> operator[](int64_t b) const {
    PatchConv<E> a = first;
    a.input += b * input_stride;
    return a;
  }
};

// The weights of a batch, packed into `bytes` each.
template <typename E>
struct Packed {
  Tensor tensor;
  int64_t stride;

  Packed(const Batch<E>& batch, const Tensor& weight, int64_t bytes, void (*pack)(const PatchConv<E>&, const E*, void*))
      : tensor(empty({batch.weights(), bytes}, ScalarType::Byte)), stride(batch.weight_stride ? bytes : 0) {
    const E* from = data<E>(weight);
    char* to = data<char>(tensor);
    torch::stable::parallel_for(0, bytes ? batch.weights() : 0, (1 << 17) / std::max<int64_t>(1, bytes) + 1,
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t b = begin; b < end; ++b) {
                                    pack(batch.first, from + b * batch.weight_stride, to + b * bytes);
                                  }
                                });
  }

  const void* operator[](int64_t b) const { return data<char>(tensor) + b * stride; }
};

template <typename E>
const PatchConvKernels<E>& kernels_of() {
  if constexpr (std::is_same_v<E, BFloat16>) {
    return kernels().patch_conv_bfloat16;
  } else {
    return typed_kernels<E>().patch_conv;
  }
}

// Multiply-adds of one product, plus the cost of the activation in the same unit.
template <typename E>
int64_t products(const PatchConv<E>& a) {
  return a.samples * a.patches * a.columns * (a.patch_dim + 8);
}

// Tasks per network into which the samples are divided: enough for many threads, each worth starting a thread for. They
// depend on the shapes alone, so that the order of sums does not depend on the number of threads.
template <typename E>
int64_t count_tasks(const PatchConv<E>& a, int64_t max_tasks) {
  constexpr int64_t kProductsPerTask = 1 << 21;
  return std::max<int64_t>(1, std::min({a.samples, products(a) / kProductsPerTask, max_tasks}));
}

template <typename E, typename T = Compute<E>>
std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& index,
                                   const std::optional<Tensor>& lam, const Polynomial& activation, int64_t saved) {
  const PatchConvKernels<E>& kernel = kernels_of<E>();
  const Batch<E> batch(input, weight, index, lam, activation);
  const PatchConv<E>& a = batch.first;
  Tensor logits = empty(batch.logits_shape, kType<T>);
  Tensor slope = empty({batch.size, saved, a.patches, a.columns}, kType<E>);
  const int64_t logits_size = a.runs * a.samples * a.classes, slope_size = saved * a.patches * a.columns;
  if (batch.size * logits_size == 0) return {logits, slope};

  const Packed<E> panels(batch, weight, kernel.panels_bytes(a), kernel.pack_panels);
  const int64_t tasks = count_tasks(a, 1024);
  T* out = data<T>(logits);
  E* slopes = data<E>(slope);
  for_each_task(batch.size * tasks, batch.size * products(a), kernel.scratch_bytes(a),
                [&](int64_t task, void* scratch) {
                  const int64_t b = task / tasks, part = task % tasks;
                  kernel.forward(batch[b], panels[b], a.samples * part / tasks, a.samples * (part + 1) / tasks,
                                 out + b * logits_size, slopes + b * slope_size, saved, scratch);
                });
  return {logits, slope};
}

template <typename E, typename T = Compute<E>>
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& slope, const Tensor& input, const Tensor& weight,
                                    const std::optional<Tensor>& index, const std::optional<Tensor>& lam,
                                    const Polynomial& activation, bool need_input, bool need_weight) {
  const PatchConvKernels<E>& kernel = kernels_of<E>();
  const Batch<E> batch(input, weight, index, lam, activation);
  const PatchConv<E>& a = batch.first;
  const int64_t columns = a.columns, logits_size = a.runs * a.samples * a.classes;
  const int64_t saved = slope.size(1), slope_size = saved * a.patches * columns;
  const int64_t sample_size = a.patches * a.patch_dim, input_size = a.samples * sample_size;
  STD_TORCH_CHECK(grad.is_contiguous() && slope.is_contiguous(), "unexpected layout");
  STD_TORCH_CHECK(grad.scalar_type() == kType<T> && slope.scalar_type() == kType<E>, "unexpected dtype");
  Tensor input_grad = need_input ? empty(shape_of(input), kType<E>) : empty({0}, kType<E>);
  Tensor weight_grad = need_weight ? empty(shape_of(weight), kType<T>) : empty({0}, kType<T>);
  if (batch.size * columns * input_size == 0) {
    if (need_input) torch::stable::zero_(input_grad);
    if (need_weight) torch::stable::zero_(weight_grad);
    return {input_grad, weight_grad};
  }

  const Packed<E> panels(batch, weight, saved < a.samples ? kernel.panels_bytes(a) : 0, kernel.pack_panels);
  const Packed<E> rows(batch, weight, need_input ? kernel.rows_bytes(a) : 0, kernel.pack_rows);
  const bool mixes = index.has_value();
  const Tensor mixed_grad = need_input && mixes ? empty({batch.size, input_size}, kType<E>) : input_grad;

  // Each task has a weight gradient of its own; all of them together stay within these bytes.
  constexpr int64_t kPartialBytes = 16 << 20;
  const int64_t partial_size = kernel.weight_grad_size(a);
  const int64_t max_tasks = kPartialBytes / int64_t(sizeof(T)) / (partial_size * batch.size);
  const int64_t tasks = count_tasks(a, need_weight ? std::clamp<int64_t>(max_tasks, 1, 64) : 1024);
  const Tensor partial = empty({need_weight ? batch.size * tasks : 0, partial_size}, kType<T>);
  const T* grads = data<T>(grad);
  const E* slopes = data<E>(slope);
  T* partials = data<T>(partial);
  E* mixed_grads = data<E>(mixed_grad);
  for_each_task(batch.size * tasks, batch.size * products(a), kernel.scratch_bytes(a),
                [&](int64_t task, void* scratch) {
                  const int64_t b = task / tasks, part = task % tasks;
                  kernel.backward(batch[b], panels[b], rows[b], a.samples * part / tasks,
                                  a.samples * (part + 1) / tasks, grads + b * logits_size, slopes + b * slope_size,
                                  saved, need_weight ? partials + task * partial_size : nullptr,
                                  need_input ? mixed_grads + b * input_size : nullptr, scratch);
                });

  if (need_weight) {
    // a weight that several descriptors share gets the sum over the tasks of all of them
    const int64_t parts = batch.weight_stride ? tasks : tasks * batch.size, length = kernel.row_length(a);
    T* to = data<T>(weight_grad);
    torch::stable::parallel_for(0, batch.weights() * columns, (1 << 15) / (a.patch_dim * parts) + 1,
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t row = begin; row < end; ++row) {
                                    const T* from =
                                        partials + row / columns * parts * partial_size + row % columns * length;
                                    T* sum = to + row * a.patch_dim;
                                    std::copy(from, from + a.patch_dim, sum);
                                    for (int64_t part = 1; part < parts; ++part) {
                                      from += partial_size;
                                      for (int64_t d = 0; d < a.patch_dim; ++d) sum[d] += from[d];
                                    }
                                  }
                                });
  }

  if (need_input && mixes) {
    const E* grads_of_mixed = data<E>(mixed_grad);
    for (int64_t b = 0; b < batch.size; ++b) {
      mixup_backward(grads_of_mixed + b * input_size, sample_size, element_of(kType<E>), a.index, a.lam, a.lam_stride,
                     a.samples, sample_size, data<E>(input_grad) + b * input_size);
    }
  }
  return {input_grad, weight_grad};
}

std::tuple<Tensor, Tensor> patch_conv(Tensor input, Tensor weight, std::optional<Tensor> index,
                                      std::optional<Tensor> lam, std::vector<double> activation, int64_t saved) {
  const auto type = input.scalar_type();
  const auto f = type == ScalarType::Float    ? forward<float>
                 : type == ScalarType::Double ? forward<double>
                                              : forward<BFloat16>;
  return f(input, weight, index, lam, polynomial_of(activation), saved);
}

std::tuple<Tensor, Tensor> patch_conv_backward(Tensor grad, Tensor slope, Tensor input, Tensor weight,
                                               std::optional<Tensor> index, std::optional<Tensor> lam,
                                               std::vector<double> activation, bool need_input, bool need_weight) {
  const auto type = input.scalar_type();
  const auto f = type == ScalarType::Float    ? backward<float>
                 : type == ScalarType::Double ? backward<double>
                                              : backward<BFloat16>;
  return f(grad, slope, input, weight, index, lam, polynomial_of(activation), need_input, need_weight);
}

}  // namespace
}  // namespace mixfeat

STABLE_TORCH_LIBRARY_FRAGMENT(mixfeat_cpu, m) {
  m.def(
      "patch_conv(Tensor input, Tensor weight, Tensor? index, Tensor? lam, float[] activation, int saved) "
      "-> (Tensor, Tensor)");
  m.def(
      "patch_conv_backward(Tensor grad, Tensor slope, Tensor input, Tensor weight, Tensor? index, Tensor? lam, "
      "float[] activation, bool need_input, bool need_weight) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mixfeat_cpu, CPU, m) {
  m.impl("patch_conv", TORCH_BOX(&mixfeat::patch_conv));
  m.impl("patch_conv_backward", TORCH_BOX(&mixfeat::patch_conv_backward));
}
