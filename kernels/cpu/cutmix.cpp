// torch.ops.mixfeat_cpu.cutmix and its backward pass: copies of parts of samples, and sums where several samples were
// cut from one. Python has checked the arguments (mixfeat/functional.py, mixfeat/ops), not the values of index and box.

#include <cstring>

#include "library.h"

namespace mixfeat {
namespace {

// A box in a sample of planes of `height` rows of `row` elements: rows [top, bottom) and, in each,
// elements [left, right).
struct Box {
  int64_t height, row, top, bottom, left, right;
};

// The boxes of all samples: one for all of them, or one each.
struct Boxes {
  const int64_t* edges;  // y0, y1, x0, x1
  int64_t stride, height, width, pixel;

  Boxes(const Tensor& box, int64_t samples, int64_t height, int64_t width, int64_t pixel)
      : edges(data<int64_t>(box)), stride(box.dim() == 2 ? 4 : 0), height(height), width(width), pixel(pixel) {
    const bool fits = box.is_contiguous() && box.numel() == 4 * (box.dim() == 2 ? samples : 1);
    STD_TORCH_CHECK(fits && box.scalar_type() == ScalarType::Long, "unexpected box");
    for (int64_t n = 0; n < (stride ? samples : 1); ++n) {
      const int64_t* e = edges + n * stride;
      const bool inside = 0 <= e[0] && e[0] <= e[1] && e[1] <= height && 0 <= e[2] && e[2] <= e[3] && e[3] <= width;
      STD_TORCH_CHECK(inside, "unexpected box");
    }
  }

  Box operator[](int64_t n) const {
    const int64_t* e = edges + n * stride;
    return {height, width * pixel, e[0], e[1], e[2] * pixel, e[3] * pixel};
  }
};

// Calls f(first, last, inside) for the parts of elements [begin, end) of a sample, each inside the box or outside.
template <typename F>
void for_each_span(const Box& box, int64_t begin, int64_t end, const F& f) {
  const int64_t plane = box.height * box.row;
  int64_t done = begin;
  const auto emit = [&](int64_t last, bool inside) {
    last = std::min(last, end);
    if (last > done) {
      f(done, last, inside);
      done = last;
    }
  };
  if (box.top < box.bottom && box.left < box.right) {
    const bool whole_rows = box.left == 0 && box.right == box.row;
    const int64_t strips = whole_rows ? 1 : box.bottom - box.top, height = whole_rows ? box.bottom - box.top : 1;
    for (int64_t start = begin / plane * plane; start < end; start += plane) {
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t at = start + (box.top + strip) * box.row;
        emit(at + box.left, false);
        emit(at + (height - 1) * box.row + box.right, true);
      }
    }
  }
  emit(end, false);
}

void check(const Tensor& samples, const Tensor& index) {
  STD_TORCH_CHECK(samples.dim() == 2 && (samples.numel() == 0 || samples.size(1) <= 1 || samples.stride(1) == 1),
                  "unexpected layout");
  STD_TORCH_CHECK(index.dim() == 1 && index.size(0) == samples.size(0) && index.is_contiguous(), "unexpected index");
  STD_TORCH_CHECK(all_within(index, samples.size(0)), "unexpected index");
}

Tensor cutmix(Tensor input, Tensor index, Tensor box, int64_t height, int64_t width, int64_t pixel) {
  check(input, index);
  const int64_t samples = input.size(0), size = input.size(1), bytes = input.element_size(),
                stride = input.stride(0) * bytes;
  const Boxes boxes(box, samples, height, width, pixel);
  const Tensor output = empty_large({samples, size}, input.scalar_type());
  const char* from = data<char>(input);
  char* to = data<char>(output);
  const int64_t* partner = data<int64_t>(index);
  for_each_part(samples, size, [&](int64_t n, int64_t begin, int64_t end) {
    for_each_span(boxes[n], begin, end, [&](int64_t first, int64_t last, bool inside) {
      std::memcpy(to + (n * size + first) * bytes, from + (inside ? partner[n] : n) * stride + first * bytes,
                  (last - first) * bytes);
    });
  });
  return output;
}

Tensor cutmix_backward(Tensor grad, Tensor index, Tensor box, int64_t height, int64_t width, int64_t pixel) {
  check(grad, index);
  const int64_t samples = grad.size(0), size = grad.size(1), bytes = grad.element_size();
  STD_TORCH_CHECK(box.dim() == 1, "unexpected box");
  const Boxes boxes(box, samples, height, width, pixel);
  // rows[start[i]] to rows[start[i + 1] - 1] are the samples into which sample i was pasted, ascending
  const int64_t* partner = data<int64_t>(index);
  std::vector<int64_t> start(samples + 2), rows(samples);
  const std::vector<double> ones(samples, 1.0);
  for (int64_t n = 0; n < samples; ++n) ++start[partner[n] + 2];
  for (int64_t i = 0; i < samples; ++i) start[i + 2] += start[i + 1];
  for (int64_t n = 0; n < samples; ++n) rows[start[partner[n] + 1]++] = n;

  const Element element = element_of(grad.scalar_type());
  const WeightedSum sum = kernels().weighted_sum(element, element);
  STD_TORCH_CHECK(sum, "unexpected dtype");
  const Tensor input_grad = empty_large({samples, size}, grad.scalar_type());
  const char* from = data<char>(grad);
  char* to = data<char>(input_grad);
  for_each_part(samples, size, [&](int64_t i, int64_t begin, int64_t end) {
    const int64_t count = start[i + 1] - start[i], *pasted = rows.data() + start[i];
    for_each_span(boxes[i], begin, end, [&](int64_t first, int64_t last, bool inside) {
      char* part = to + (i * size + first) * bytes;
      if (inside && count == 0) {
        std::memset(part, 0, (last - first) * bytes);
      } else if (inside && count > 1) {
        sum(from + first * bytes, grad.stride(0), pasted, ones.data(), count, last - first, part);
      } else {
        std::memcpy(part, from + ((inside ? *pasted : i) * grad.stride(0) + first) * bytes, (last - first) * bytes);
      }
    });
  });
  return input_grad;
}

}  // namespace
}  // namespace mixfeat

STABLE_TORCH_LIBRARY_FRAGMENT(mixfeat_cpu, m) {
  m.def("cutmix(Tensor input, Tensor index, Tensor box, int height, int width, int pixel) -> Tensor");
  m.def("cutmix_backward(Tensor grad, Tensor index, Tensor box, int height, int width, int pixel) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mixfeat_cpu, CPU, m) {
  m.impl("cutmix", TORCH_BOX(&mixfeat::cutmix));
  m.impl("cutmix_backward", TORCH_BOX(&mixfeat::cutmix_backward));
}
