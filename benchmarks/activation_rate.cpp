// The rate at which this processor evaluates PolyReLU of degree 8 with everything in registers: the arithmetic limit of the
// all-pairs Mixup loss. Each function runs `rounds` rounds of 8 vectors and returns how many evaluations that was.

#include "isa/activation.h"

#if defined(__AVX512F__)
#define IN_REGISTER(x) asm volatile("" : "+v"(x))
#elif defined(__x86_64__)
#define IN_REGISTER(x) asm volatile("" : "+x"(x))
#elif defined(__aarch64__)
#define IN_REGISTER(x) asm volatile("" : "+w"(x))
#else
#define IN_REGISTER(x) asm volatile("" : "+m"(x))
#endif

namespace {

using mixfeat::Vec;
using Phi = mixfeat::Activation<float, 8, true>;
constexpr int kVectors = 8;

}  // namespace

extern "C" double forward(int64_t rounds) {
  const Phi phi(mixfeat::Polynomial{8, 0.1, 0.1, true, true, 0.0});
  Vec<float> sum[kVectors] = {}, t[kVectors], other = mixfeat::broadcast(0.1f);
  for (int i = 0; i < kVectors; ++i) t[i] = mixfeat::broadcast(0.05f * i);
  for (int64_t k = 0; k < rounds; ++k) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      sum[i] = phi.add_to(sum[i], t[i] + other);
      IN_REGISTER(sum[i]);
    }
    IN_REGISTER(other);
  }
  return double(rounds) * kVectors * mixfeat::kLanes<float>;
}

extern "C" double backward(int64_t rounds) {
  const Phi phi(mixfeat::Polynomial{8, 0.1, 0.1, true, true, 0.0});
  Vec<float> row[kVectors] = {}, column[4] = {}, t[kVectors], other = mixfeat::broadcast(0.1f);
  const Vec<float> d = mixfeat::broadcast(1e-3f);
  for (int i = 0; i < kVectors; ++i) t[i] = mixfeat::broadcast(0.05f * i);
  for (int64_t k = 0; k < rounds; ++k) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      const Vec<float> e = phi.slope_times(t[i] + other, d);
      row[i] += e;
      column[i % 4] += e;
      IN_REGISTER(row[i]);
    }
    for (int i = 0; i < 4; ++i) IN_REGISTER(column[i]);
    IN_REGISTER(other);
  }
  return double(rounds) * kVectors * mixfeat::kLanes<float>;
}
