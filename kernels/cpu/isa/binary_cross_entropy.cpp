// Binary cross-entropy of one row of logits, with its gradient, in one pass.

#include "../kernels.h"
#include "element.h"
#include "exponential.h"
#include "sums.h"

namespace mixfeat::MIXFEAT_ISA {
namespace {

constexpr int kUnroll = 4;

// log(1 + e) for 0 <= e <= 1: 2 artanh(e / (2 + e)), whose series ends when a term is less than the type can tell
// from 1.
template <typename T>
inline Vec<T> log_1_plus(Vec<T> e) {
  constexpr int kTerms = sizeof(T) == 4 ? 8 : 17;
  const Vec<T> s = e / (e + broadcast(T(2))), square = s * s;
  Vec<T> sum = broadcast(T(1) / (2 * kTerms - 1));
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; --k) sum = sum * square + broadcast(T(1) / (2 * k + 1));
  return broadcast(T(2)) * s * sum;
}

template <typename T, typename E, bool kWeighted>
double binary_cross_entropy_of(const void* logits, int64_t classes, const BinaryLabel& label, const void* weights,
                               double scale, void* losses, void* grad_pointer) {
  constexpr int lanes = kLanes<T>;
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const E* x = static_cast<const E*>(logits);
  const T* pos_weight = static_cast<const T*>(weights);
  T* loss = static_cast<T*>(losses);
  E* grad = static_cast<E*>(grad_pointer);
  Integers<Lane, T> lane{};
  for (int k = 0; k < lanes; ++k) lane[k] = k;
  const Vec<T> one = broadcast(T(1)), zero{};

  // the loss of up to a vector of classes from c on
  const auto vector = [&](int64_t c, int64_t count) -> Vec<T> {
    const Vec<T> logit = load_first<T>(x + c, count, T(0));
    Vec<T> q = broadcast(T(label.base));
    for (int j = 0; j < 2; ++j) {
      const int64_t target_lane = label.classes[j] - c;
      if (target_lane >= 0 && target_lane < lanes) q = lane == Lane(target_lane) ? broadcast(T(label.values[j])) : q;
    }
    const Vec<T> e = exponential(logit < zero ? logit : -logit), sigmoid_abs = one / (one + e);
    const Vec<T> w = kWeighted ? one + (load_first<T>(pos_weight + c, count, T(1)) - one) * q : one;
    const Vec<T> value = (one - q) * logit + w * ((logit < zero ? -logit : zero) + log_1_plus<T>(e));
    if (grad) {
      const Vec<T> slope = (one - q) - w * (logit < zero ? sigmoid_abs : e * sigmoid_abs);
      store_first<T>(grad + c, count, slope * broadcast(T(scale)));
    }
    if (loss) store_first<T>(loss + c, count, value);
    return value;
  };
  Vec<T> sums[kUnroll] = {};
  int64_t c = 0;
  for (; c + kUnroll * lanes <= classes; c += kUnroll * lanes) {
    for (int j = 0; j < kUnroll; ++j) sums[j] += vector(c + j * lanes, lanes);
  }
  for (; c < classes; c += lanes) {
    const int64_t count = min(classes - c, lanes);
    sums[0] += first_lanes<T>(count) ? vector(c, count) : zero;
  }
  for (int j = 1; j < kUnroll; ++j) sums[0] += sums[j];
  return sum_of_lanes<T>(sums[0]);
}

template <typename T, typename E>
double binary_cross_entropy_in(const void* logits, int64_t classes, const BinaryLabel& label, const void* pos_weight,
                               double scale, void* losses, void* grad) {
  const auto f = pos_weight ? binary_cross_entropy_of<T, E, true> : binary_cross_entropy_of<T, E, false>;
  return f(logits, classes, label, pos_weight, scale, losses, grad);
}

}  // namespace

BinaryCrossEntropy binary_cross_entropy(Element logits) {
  switch (logits) {
    case Element::kFloat:
      return binary_cross_entropy_in<float, float>;
    case Element::kDouble:
      return binary_cross_entropy_in<double, double>;
    case Element::kBFloat16:
      return binary_cross_entropy_in<float, BFloat16>;
    case Element::kHalf:
      return binary_cross_entropy_in<float, Half>;
    default:
      return nullptr;
  }
}

}  // namespace mixfeat::MIXFEAT_ISA
