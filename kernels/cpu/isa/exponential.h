// The exponential function on vectors.
#pragma once

#include <math.h>

#include "simd.h"

namespace mixfeat {
namespace {

// exp(x) for x <= 0; relative error below 2 units in the last place. Below -87 it is 0, NaN stays.
inline Vec<float> exponential(Vec<float> x) {
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  const Vec<float> clipped = clamp_min<float>(x, broadcast(-87.0f));
  const Vec<float> shifter = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec<float> shifted = clipped * broadcast(1.44269504f) + shifter;
  const Vec<float> n = shifted - shifter;
  Vec<float> r = clipped - n * broadcast(0.693145752f);
  r = r - n * broadcast(1.42860677e-6f);
  Vec<float> p = broadcast(1.9875691500e-4f);
  p = p * r + broadcast(1.3981999507e-3f);
  p = p * r + broadcast(8.3334519073e-3f);
  p = p * r + broadcast(4.1665795894e-2f);
  p = p * r + broadcast(1.6666665459e-1f);
  p = p * r + broadcast(5.0000001201e-1f);
  p = p * r * r + r + broadcast(1.0f);
  const Bits scale = ((Bits)shifted - (Bits)shifter + 127) << 23;
  const Vec<float> result = p * (Vec<float>)scale;
  return x < broadcast(-87.0f) ? Vec<float>{} : result;
}

inline Vec<double> exponential(Vec<double> x) {
  for (int k = 0; k < kLanes<double>; ++k) x[k] = ::exp(x[k]);
  return x;
}

}  // namespace
}  // namespace mixfeat
