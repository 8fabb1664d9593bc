// torch.ops.mixfeat_cpu.mixup and its backward pass: divide the work into tasks and own all memory. Python has checked
// the arguments (mixfeat/functional.py, mixfeat/ops), except the values of index and lam.

#include "mixup.h"

namespace mixfeat {
namespace {

// A batch, contiguous or of two dimensions with the elements of a sample side by side.
struct Batch {
  int64_t samples, size, stride;

  explicit Batch(const Tensor& t)
      : samples(t.dim() ? t.size(0) : 0), size(samples ? t.numel() / samples : 0), stride(size) {
    if (t.dim() && t.is_contiguous()) return;
    STD_TORCH_CHECK(t.dim() == 2 && (samples == 0 || size <= 1 || t.stride(1) == 1), "unexpected layout");
    stride = t.stride(0);
  }
};

Batch check(const Tensor& input, const Tensor& index) {
  const Batch batch(input);
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long, "unexpected index");
  STD_TORCH_CHECK(index.dim() == 1 && index.size(0) == batch.samples && index.is_contiguous(), "unexpected index");
  STD_TORCH_CHECK(all_within(index, batch.samples), "unexpected partners");
  return batch;
}

// `type`: of the mixed samples, which decides how exact lam is.
Batch check(const Tensor& input, const Tensor& index, const Tensor& lam, ScalarType type) {
  const Batch batch = check(input, index);
  STD_TORCH_CHECK((lam.scalar_type() == ScalarType::Double) == (type == ScalarType::Double), "unexpected lam");
  STD_TORCH_CHECK(lam.dim() == 0 || (lam.dim() == 1 && lam.size(0) == batch.samples), "unexpected lam");
  STD_TORCH_CHECK(all_fractions(lam), "unexpected lam");
  return batch;
}

// Calls f(values of lam, their stride) for lam of float or double.
template <typename F>
void with_lam(const Tensor& lam, const F& f) {
  const int64_t stride = lam.dim() ? lam.stride(0) : 0;
  if (lam.scalar_type() == ScalarType::Float) {
    f(data<float>(lam), stride);
  } else {
    STD_TORCH_CHECK(lam.scalar_type() == ScalarType::Double, "unexpected lam");
    f(data<double>(lam), stride);
  }
}

template <typename L>
Tensor mix(const Tensor& input, const Batch& batch, const Tensor& index, const L* lam, int64_t lam_stride,
           ScalarType dtype) {
  const int64_t size = batch.size, stride = batch.stride;
  const WeightedSum sum = kernels().weighted_sum(element_of(input.scalar_type()), element_of(dtype));
  STD_TORCH_CHECK(sum, "unexpected dtype");
  const Tensor output = empty_large(shape_of(input), dtype);
  const char* from = data<char>(input);
  char* to = data<char>(output);
  const int64_t *partner = data<int64_t>(index), width = input.element_size(), output_width = output.element_size();
  for_each_part(batch.samples, size, [&](int64_t n, int64_t begin, int64_t end) {
    const int64_t rows[] = {n, partner[n]};
    const double weights[] = {double(lam[n * lam_stride]), 1 - double(lam[n * lam_stride])};
    sum(from + begin * width, stride, rows, weights, 2, end - begin, to + (n * size + begin) * output_width);
  });
  return output;
}

Tensor mixup(Tensor input, Tensor index, Tensor lam, ScalarType dtype) {
  const Batch batch = check(input, index, lam, dtype);
  Tensor output = input;
  with_lam(lam,
           [&](const auto* lams, int64_t lam_stride) { output = mix(input, batch, index, lams, lam_stride, dtype); });
  return output;
}

// The same with a number for all samples, as exact as a tensor would be.
Tensor mixup_by_number(Tensor input, Tensor index, double lam, ScalarType dtype) {
  const Batch batch = check(input, index);
  STD_TORCH_CHECK(lam >= 0 && lam <= 1, "unexpected lam");
  const double exact = dtype == ScalarType::Double ? lam : float(lam);
  return mix(input, batch, index, &exact, 0, dtype);
}

Tensor mixup_backward_of(Tensor grad, Tensor index, Tensor lam) {
  const Batch batch = check(grad, index, lam, grad.scalar_type());
  const Tensor input_grad = empty_large(shape_of(grad), grad.scalar_type());
  with_lam(lam, [&](const auto* lams, int64_t lam_stride) {
    mixup_backward(data<char>(grad), batch.stride, element_of(grad.scalar_type()), data<int64_t>(index), lams,
                   lam_stride, batch.samples, batch.size, data<char>(input_grad));
  });
  return input_grad;
}

}  // namespace

template <typename L>
void mixup_backward(const void* grad, int64_t stride, Element element, const int64_t* index, const L* lam,
                    int64_t lam_stride, int64_t samples, int64_t size, void* input_grad) {
  // rows[start[i]] to rows[start[i + 1] - 1] are the mixed samples that contain sample i: its own first, then ascending
  std::vector<int64_t> start(samples + 2), rows(2 * samples);
  std::vector<double> weights(2 * samples);
  for (int64_t n = 0; n < samples; ++n) ++start[index[n] + 2];
  for (int64_t i = 0; i < samples; ++i) start[i + 2] += start[i + 1] + 1;
  const auto add = [&](int64_t i, int64_t n, double weight) {
    rows[start[i + 1]] = n;
    weights[start[i + 1]++] = weight;
  };
  for (int64_t i = 0; i < samples; ++i) add(i, i, lam[i * lam_stride]);
  for (int64_t n = 0; n < samples; ++n) add(index[n], n, 1 - double(lam[n * lam_stride]));

  const WeightedSum sum = kernels().weighted_sum(element, element);
  STD_TORCH_CHECK(sum, "unexpected dtype");
  const int64_t width = bytes_of(element);
  for_each_part(samples, size, [&](int64_t i, int64_t begin, int64_t end) {
    sum(static_cast<const char*>(grad) + begin * width, stride, rows.data() + start[i], weights.data() + start[i],
        start[i + 1] - start[i], end - begin, static_cast<char*>(input_grad) + (i * size + begin) * width);
  });
}

template void mixup_backward(const void*, int64_t, Element, const int64_t*, const float*, int64_t, int64_t, int64_t,
                             void*);
template void mixup_backward(const void*, int64_t, Element, const int64_t*, const double*, int64_t, int64_t, int64_t,
                             void*);

}  // namespace mixfeat

STABLE_TORCH_LIBRARY_FRAGMENT(mixfeat_cpu, m) {
  m.def("mixup(Tensor input, Tensor index, Tensor lam, ScalarType dtype) -> Tensor");
  m.def("mixup_by_number(Tensor input, Tensor index, float lam, ScalarType dtype) -> Tensor");
  m.def("mixup_backward(Tensor grad, Tensor index, Tensor lam) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mixfeat_cpu, CPU, m) {
  m.impl("mixup", TORCH_BOX(&mixfeat::mixup));
  m.impl("mixup_by_number", TORCH_BOX(&mixfeat::mixup_by_number));
  m.impl("mixup_backward", TORCH_BOX(&mixfeat::mixup_backward_of));
}
