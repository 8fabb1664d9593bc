// The table of this instruction set. The files in this folder are compiled once per instruction set, which defines
// MIXFEAT_ISA.

#include "../kernels.h"

namespace mixfeat::MIXFEAT_ISA {

// Each is defined in the file of its operator.
WeightedSum weighted_sum(Element input, Element output);
CrossEntropy cross_entropy(Element logits, Element target);
BinaryCrossEntropy binary_cross_entropy(Element logits);
template <typename E>
PatchConvKernels<E> patch_conv();
template <typename T>
PairwiseMixupKernels<T> pairwise_mixup_loss();
template <typename T>
GradientDescentKernels<T> gradient_descent();

#if defined(__AVX512BF16__)
Kernels kernels() {  // of a few files; the rest is AVX-512's
  Kernels table = avx512::kernels();
  table.patch_conv_bfloat16 = patch_conv<BFloat16>();
  return table;
}
#else
Kernels kernels() {
  return {{patch_conv<float>(), pairwise_mixup_loss<float>(), gradient_descent<float>()},
          {patch_conv<double>(), pairwise_mixup_loss<double>(), gradient_descent<double>()},
          patch_conv<BFloat16>(),
          weighted_sum,
          cross_entropy,
          binary_cross_entropy};
}
#endif

}  // namespace mixfeat::MIXFEAT_ISA
