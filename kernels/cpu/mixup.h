// The gradient of mixing, for other operators that mix samples.
#pragma once

#include "library.h"

namespace mixfeat {

// input_grad_i = lam_i grad_i + sum over n with index_n = i of (1 - lam_n) grad_n, for N samples of `size` elements
// that lie `stride` elements apart in grad and side by side in input_grad.
template <typename L>
void mixup_backward(const void* grad, int64_t stride, Element element, const int64_t* index, const L* lam,
                    int64_t lam_stride, int64_t samples, int64_t size, void* input_grad);

}  // namespace mixfeat
