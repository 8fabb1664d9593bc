// Cross-entropy of one row of logits on one CPU instruction set: what cross_entropy_library.cpp calls and cross_entropy.cpp
// defines.
#pragma once

#include "element.h"

namespace mixfeat {

// What each class counts for: label_c = base + sum over j of values[j] [c = classes[j]] + scale * target_c.
struct Label {
  double base;
  int64_t classes[2];
  double values[2];
  const void* target;  // (C,), or null: no such term
  double scale;
};

// loss = - sum_c label_c log softmax(logits)_c, which is returned;  grad_c = softmax(logits)_c sum_k label_k - label_c, of the
// logits' element, or null. Formed in float, in double for double. `scratch` has room for as many of them as there are classes.
using CrossEntropy = double (*)(const void* logits, int64_t classes, const Label& label, void* scratch, void* grad);

#define MIXFEAT_DECLARE(ISA)                                                   \
  namespace ISA {                                                              \
  /* null for a pair of elements that there is no use for */                   \
  CrossEntropy cross_entropy(Element logits, Element target);                  \
  }
MIXFEAT_DECLARE(generic)
MIXFEAT_DECLARE(avx2)
MIXFEAT_DECLARE(avx512)
#undef MIXFEAT_DECLARE

}  // namespace mixfeat
