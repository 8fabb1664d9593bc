// The table of this instruction set. Every file in this folder is compiled once per instruction set, which defines MIXFEAT_ISA.

#include "../kernels.h"

namespace mixfeat::MIXFEAT_ISA {

// Each is defined in the file of its operator.
WeightedSum weighted_sum(Element input, Element output);
CrossEntropy cross_entropy(Element logits, Element target);
BinaryCrossEntropy binary_cross_entropy(Element logits);
template <typename T>
PatchConvKernels<T> patch_conv();
template <typename T>
PairwiseMixupKernels<T> pairwise_mixup_loss();
template <typename T>
GradientDescentKernels<T> gradient_descent();

Kernels kernels() {
  return {{patch_conv<float>(), pairwise_mixup_loss<float>(), gradient_descent<float>()},
          {patch_conv<double>(), pairwise_mixup_loss<double>(), gradient_descent<double>()},
          weighted_sum,
          cross_entropy,
          binary_cross_entropy};
}

}  // namespace mixfeat::MIXFEAT_ISA
