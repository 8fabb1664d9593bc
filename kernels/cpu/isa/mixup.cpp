// Weighted sums of samples.

#include "../kernels.h"
#include "element.h"

namespace mixfeat::MIXFEAT_ISA {
namespace {

template <typename T, typename In, typename Out, int kVectors>
inline void sum_vectors(const In* samples, int64_t stride, const int64_t* rows, const double* weights, int64_t count,
                        Out* output) {
  Vec<T> sum[kVectors] = {};
  for (int64_t r = 0; r < count; ++r) {
    const Vec<T> weight = broadcast(T(weights[r]));
    const In* from = samples + rows[r] * stride;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[v] += weight * load_as<T>(from + v * kLanes<T>);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) store_as(output + v * kLanes<T>, sum[v]);
}

template <typename In, typename Out>
void weighted_sum_of(const void* samples, int64_t stride, const int64_t* rows, const double* weights, int64_t count,
                     int64_t size, void* output) {
  using T = std::conditional_t<std::is_same_v<Out, double>, double, float>;
  constexpr int lanes = kLanes<T>, block = 4 * lanes;
  const In* from = static_cast<const In*>(samples);
  Out* to = static_cast<Out*>(output);
  int64_t k = 0;
  for (; k + block <= size; k += block) {
    sum_vectors<T, In, Out, 4>(from + k, stride, rows, weights, count, to + k);
  }
  for (; k + lanes <= size; k += lanes) {
    sum_vectors<T, In, Out, 1>(from + k, stride, rows, weights, count, to + k);
  }
  if (k < size) {
    Vec<T> sum{};
    for (int64_t r = 0; r < count; ++r) {
      sum += broadcast(T(weights[r])) * load_first<T>(from + k + rows[r] * stride, size - k, T(0));
    }
    store_first<T>(to + k, size - k, sum);
  }
}

}  // namespace

WeightedSum weighted_sum(Element input, Element output) {
  if (input == Element::kByte) {
    switch (output) {
      case Element::kFloat:
        return weighted_sum_of<uint8_t, float>;
      case Element::kDouble:
        return weighted_sum_of<uint8_t, double>;
      case Element::kBFloat16:
        return weighted_sum_of<uint8_t, BFloat16>;
      case Element::kHalf:
        return weighted_sum_of<uint8_t, Half>;
      default:
        return nullptr;
    }
  }
  if (input != output) return nullptr;
  switch (input) {
    case Element::kFloat:
      return weighted_sum_of<float, float>;
    case Element::kDouble:
      return weighted_sum_of<double, double>;
    case Element::kBFloat16:
      return weighted_sum_of<BFloat16, BFloat16>;
    default:
      return weighted_sum_of<Half, Half>;
  }
}

}  // namespace mixfeat::MIXFEAT_ISA
