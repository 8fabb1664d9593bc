// Weighted sums of samples on one CPU instruction set: what mixup_library.cpp calls and mixup.cpp defines.
#pragma once

#include "element.h"

namespace mixfeat {

// output_k = sum over r of weights[r] * samples[rows[r]][k], for k in [0, size); samples lie `stride` elements apart. Formed in
// float, in double for double.
using WeightedSum = void (*)(const void* samples, int64_t stride, const int64_t* rows, const double* weights, int64_t count,
                             int64_t size, void* output);

#define MIXFEAT_DECLARE(ISA)                                              \
  namespace ISA {                                                         \
  /* null for a pair of elements that there is no use for */              \
  WeightedSum weighted_sum(Element input, Element output);                \
  }
MIXFEAT_DECLARE(generic)
MIXFEAT_DECLARE(avx2)
MIXFEAT_DECLARE(avx512)
#undef MIXFEAT_DECLARE

}  // namespace mixfeat
