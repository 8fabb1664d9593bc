// The fused patch convolution on one CPU instruction set: what patch_conv_library.cpp calls and patch_conv.cpp defines.
#pragma once

#include "polynomial.h"

namespace mixfeat {

// R networks on the same data. Rows of `input` (the D features of a patch) are contiguous.
template <typename T>
struct PatchConv {
  int64_t samples, patches, features, runs, classes, filters;  // N, P, D, R, C, M
  const T* input;                                        // (N, P, D)
  int64_t sample_stride, patch_stride;
  const int64_t* index;  // (N,), or null: nothing is mixed
  const T* lam;          // () or (N,)
  int64_t lam_stride;
  Polynomial activation;

  int64_t columns() const { return runs * classes * filters; }
};

// Functions over a range of samples; `scratch` holds as many elements as scratch_size says. Results depend on the range
// that a call is given, so callers split the samples by shape alone, never by the number of threads.
template <typename T>
struct PatchConvKernels {
  // weight (R*C*M, D) transposed into panels and divided by the threshold: what forward multiplies by
  int64_t (*panels_size)(const PatchConv<T>&);
  void (*pack_panels)(const PatchConv<T>&, const T* weight, T* panels);
  // weight with its rows padded to whole vectors: what the gradient of the input is multiplied by
  int64_t (*row_length)(const PatchConv<T>&);
  int64_t (*rows_size)(const PatchConv<T>&);
  void (*pack_rows)(const PatchConv<T>&, const T* weight, T* rows);
  int64_t (*scratch_size)(const PatchConv<T>&);

  // logits (R, N, C); slope (saved, P, R*C*M): phi' at the pre-activations of the first `saved` samples
  void (*forward)(const PatchConv<T>&, const T* panels, int64_t begin, int64_t end, T* logits, T* slope, int64_t saved,
                  T* scratch);
  // grad (R, N, C) -> weight_grad (R*C*M, D padded as in rows), overwritten; mixed_grad (N, P, D): gradient of the mixed input.
  // Either may be null. panels is not read when every slope is saved, nor rows when mixed_grad is null.
  void (*backward)(const PatchConv<T>&, const T* panels, const T* rows, int64_t begin, int64_t end, const T* grad,
                   const T* slope, int64_t saved, T* weight_grad, T* mixed_grad, T* scratch);
};

#define MIXFEAT_DECLARE(ISA)                          \
  namespace ISA {                                     \
  extern const PatchConvKernels<float> patch_conv_float;   \
  extern const PatchConvKernels<double> patch_conv_double; \
  }
MIXFEAT_DECLARE(generic)
MIXFEAT_DECLARE(avx2)
MIXFEAT_DECLARE(avx512)
#undef MIXFEAT_DECLARE

}  // namespace mixfeat
