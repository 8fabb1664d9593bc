// kernels/polynomial.py
#pragma once

#include <cstdint>

namespace mixfeat {

struct Polynomial {
  int64_t degree;
  double threshold;
  double scale;
  bool lower;
  bool upper;
};

}  // namespace mixfeat
