// The fused patch convolution (mix, convolve, activate, sum) and its gradients.
//
// A block of rows (sample, patch) is mixed into scratch and multiplied by one panel of filters at a time. The activation is
// applied to that tile while it is in the first-level cache, and summed over the patches. The backward pass does the same, or
// reads the slopes that forward saved, and multiplies the block E = grad * phi' by the mixed rows and by the weight.

#include "../kernels.h"
#include "../scratch.h"
#include "activation.h"
#include "element.h"
#include "gemm.h"

namespace mixfeat::MIXFEAT_ISA {
namespace {

// A row length in whole vectors that does not map successive rows onto the same cache sets.
template <typename T>
int64_t padded(int64_t columns) {
  const int64_t length = round_up(columns, kPanel<T>);
  return length * sizeof(T) % 512 == 0 ? length + kLanes<T> : length;
}

// The rows of one block: several whole samples where they fit, else a part of one sample's patches.
template <typename T>
struct Blocks {
  int64_t samples, patches;      // per block
  int64_t rows;                  // their product, with room for the last row group of the matrix product
  int64_t row_length, e_length;  // padded row lengths of the mixed input and of E

  explicit Blocks(const PatchConv<T>& a) : row_length(padded<T>(a.patch_dim)), e_length(padded<T>(a.columns)) {
    constexpr int64_t kCacheBytes = 384 << 10;  // a block's share of the second-level cache
    const int64_t fitting_rows = kCacheBytes / int64_t(sizeof(T)) / (row_length + e_length);
    const int64_t max_rows = max(48, min(fitting_rows, 240)) / kTileRows * kTileRows;
    patches = min(a.patches, max_rows);
    samples = min(max(1, max_rows / max(1, a.patches)), max(1, a.samples));
    rows = round_up(samples * patches, kTileRows);
  }
};

// The buffers of one thread. phi is the sum of scale / degree * poly and scale * linear.
template <typename T>
struct Buffers {
  Scratch scratch;
  T *mixed, *tile, *poly, *linear, *filter_grad, *e, *mixed_grad;

  Buffers(const Blocks<T>& b, void* memory)
      : scratch(memory),
        mixed(scratch.take<T>(b.rows * b.row_length)),
        tile(scratch.take<T>(b.rows * kPanel<T>)),
        poly(scratch.take<T>(b.samples * b.e_length)),
        linear(scratch.take<T>(b.samples * b.e_length)),
        filter_grad(scratch.take<T>(b.samples * b.e_length)),
        e(scratch.take<T>(b.rows * b.e_length)),
        mixed_grad(scratch.take<T>(b.rows * b.row_length)) {}
};

template <typename T>
int64_t scratch_bytes(const PatchConv<T>& a) {
  return Buffers<T>(Blocks<T>(a), nullptr).scratch.bytes();
}

template <typename T>
int64_t panel_width(int64_t columns) {
  return columns > kPanel<T> ? kPanel<T> : round_up(columns, kLanes<T>);
}

template <typename T>
int64_t panels_size(const PatchConv<T>& a) {
  return round_up(a.columns, kLanes<T>) * a.patch_dim;
}

template <typename T>
void pack_panels(const PatchConv<T>& a, const T* weight, T* panels) {
  const T factor = T(1 / a.activation.threshold);
  for (int64_t q = 0; q < a.columns; q += kPanel<T>) {
    const int64_t width = panel_width<T>(a.columns - q), valid = min(kPanel<T>, a.columns - q);
    for (int64_t d = 0; d < a.patch_dim; ++d, panels += width) {
      for (int64_t j = 0; j < valid; ++j) panels[j] = weight[(q + j) * a.patch_dim + d] * factor;
      for (int64_t j = valid; j < width; ++j) panels[j] = 0;
    }
  }
}

template <typename T>
int64_t row_length(const PatchConv<T>& a) {
  return padded<T>(a.patch_dim);
}

template <typename T>
int64_t rows_size(const PatchConv<T>& a) {
  return round_up(a.columns, kRowGroup) * row_length(a);
}

template <typename T>
void pack_rows(const PatchConv<T>& a, const T* weight, T* rows) {
  const int64_t length = row_length(a);
  for (int64_t q = 0; q < a.columns; ++q) {
    for (int64_t d = 0; d < a.patch_dim; ++d) rows[q * length + d] = weight[q * a.patch_dim + d];
    for (int64_t d = a.patch_dim; d < length; ++d) rows[q * length + d] = 0;
  }
}

// Samples [n, n + samples) at patches [p, p + patches), mixed with their partners, as rows of length `length`.
template <typename T>
void fill_mixed(const PatchConv<T>& a, int64_t n, int64_t samples, int64_t p, int64_t patches, T* out, int64_t length) {
  for (int64_t i = n; i < n + samples; ++i) {
    const T* x = a.input + i * a.sample_stride + p * a.patch_stride;
    const T* partner = a.index ? a.input + a.index[i] * a.sample_stride + p * a.patch_stride : nullptr;
    const T lam = a.index ? a.lam[i * a.lam_stride] : T(1);
    for (int64_t r = 0; r < patches; ++r, x += a.patch_stride, out += length) {
      if (partner) {
        for (int64_t d = 0; d < a.patch_dim; ++d) out[d] = lam * x[d] + (T(1) - lam) * partner[d];
        partner += a.patch_stride;
      } else {
        for (int64_t d = 0; d < a.patch_dim; ++d) out[d] = x[d];
      }
      for (int64_t d = a.patch_dim; d < length; ++d) out[d] = 0;
    }
  }
}

// Works on one column of vectors of a tile of t, over `rows` patches of one sample. With kValue it adds the two parts of phi to
// *poly and *linear; with kSlope it writes factor * (phi' in units of scale / threshold) to the first `count` columns of `out`.
template <typename T, int kDegree, bool kUpper, bool kValue, bool kSlope>
void activate_column(bool lower, const T* tile, int64_t width, int64_t rows, T* poly, T* linear, Vec<T> factor, T* out,
                     int64_t length, int64_t count) {
  const Activation<T, kDegree, kUpper> phi(lower);
  Vec<T> poly_sum{}, linear_sum{};
  if (kValue) {
    poly_sum = load(poly);
    linear_sum = load(linear);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const Vec<T> t = load(tile + r * width), clamped = phi.clamp_min(t), u = phi.clamp_max(clamped);
    if (kValue) {
      poly_sum += power<kDegree>(u);
      if (kUpper) linear_sum += clamped - u;
    }
    if (kSlope) store_first<T>(out + r * length, count, phi.slope(t, u) * factor);
  }
  if (kValue) {
    store(poly, poly_sum);
    store(linear, linear_sum);
  }
}

template <typename T, bool kValue, bool kSlope>
auto activate_column_of(const Polynomial& p) {
  return instance(p, [](auto degree, auto upper) {
    return &activate_column<T, decltype(degree)::value, decltype(upper)::value, kValue, kSlope>;
  });
}

template <typename T>
void forward(const PatchConv<T>& a, const T* panels, int64_t begin, int64_t end, T* logits, T* slope, int64_t saved,
             void* scratch) {
  const Blocks<T> block(a);
  const Buffers<T> s(block, scratch);
  const int64_t columns = a.columns;
  const auto value = activate_column_of<T, true, false>(a.activation);
  const auto value_and_slope = activate_column_of<T, true, true>(a.activation);
  const Vec<T> factor = broadcast(T(a.activation.scale / a.activation.threshold));

  for (int64_t n = begin; n < end; n += block.samples) {
    const int64_t samples = min(block.samples, end - n);
    for (int64_t j = 0; j < samples * block.e_length; ++j) s.poly[j] = s.linear[j] = 0;
    for (int64_t p = 0; p < a.patches; p += block.patches) {
      const int64_t patches = min(block.patches, a.patches - p), rows = samples * patches;
      fill_mixed(a, n, samples, p, patches, s.mixed, block.row_length);
      for (int64_t q = 0; q < columns; q += kPanel<T>) {
        const int64_t width = panel_width<T>(columns - q);
        gemm_panel<T>(rows, width, a.patch_dim, s.mixed, block.row_length, 1, panels + q * a.patch_dim, width, s.tile, width,
                      false);
        for (int64_t i = 0; i < samples; ++i) {
          const bool save = n + i < saved;
          T* out = save ? slope + ((n + i) * a.patches + p) * columns + q : nullptr;
          for (int64_t j = 0; j < width; j += kLanes<T>) {
            (save ? value_and_slope : value)(a.activation.lower, s.tile + i * patches * width + j, width, patches,
                                             s.poly + i * block.e_length + q + j, s.linear + i * block.e_length + q + j, factor,
                                             out + j, columns, columns - q - j);
          }
        }
      }
    }
    const T poly_scale = T(a.activation.scale / a.activation.degree), linear_scale = T(a.activation.scale);
    for (int64_t i = 0; i < samples; ++i) {
      const T *poly = s.poly + i * block.e_length, *linear = s.linear + i * block.e_length;
      for (int64_t run = 0; run < a.runs; ++run) {
        T* out = logits + (run * a.samples + n + i) * a.classes;
        for (int64_t c = 0; c < a.classes; ++c) {
          T poly_sum = 0, linear_sum = 0;
          for (int64_t m = 0; m < a.filters; ++m) {
            poly_sum += *poly++;
            linear_sum += *linear++;
          }
          out[c] = poly_scale * poly_sum + linear_scale * linear_sum;
        }
      }
    }
  }
}

template <typename T>
void backward(const PatchConv<T>& a, const T* panels, const T* weight_rows, int64_t begin, int64_t end, const T* grad,
              const T* slope, int64_t saved, T* weight_grad, T* mixed_grad, void* scratch) {
  const Blocks<T> block(a);
  const Buffers<T> s(block, scratch);
  const int64_t columns = a.columns, grouped = round_up(columns, kRowGroup), length = row_length(a);
  const auto slope_only = activate_column_of<T, false, true>(a.activation);
  const Vec<T> factor = broadcast(T(a.activation.scale / a.activation.threshold));
  bool accumulate = false;

  for (int64_t n = begin; n < end; n += block.samples) {
    const int64_t samples = min(block.samples, end - n);
    for (int64_t i = 0; i < samples; ++i) {  // the logits' gradient, once per filter
      T* g = s.filter_grad + i * block.e_length;
      for (int64_t run = 0; run < a.runs; ++run) {
        const T* from = grad + (run * a.samples + n + i) * a.classes;
        for (int64_t c = 0; c < a.classes; ++c) {
          for (int64_t m = 0; m < a.filters; ++m) *g++ = from[c];
        }
      }
      for (int64_t q = columns; q < block.e_length; ++q) *g++ = 0;
    }
    for (int64_t p = 0; p < a.patches; p += block.patches) {
      const int64_t patches = min(block.patches, a.patches - p), rows = samples * patches;
      if (weight_grad || n + samples > saved) fill_mixed(a, n, samples, p, patches, s.mixed, block.row_length);

      if (n + samples <= saved) {
        for (int64_t i = 0; i < samples; ++i) {
          const T* g = s.filter_grad + i * block.e_length;
          const T* from = slope + ((n + i) * a.patches + p) * columns;
          T* e = s.e + i * patches * block.e_length;
          for (int64_t r = 0; r < patches; ++r, from += columns, e += block.e_length) {
            for (int64_t q = 0; q < columns; ++q) e[q] = from[q] * g[q];
          }
        }
      } else {
        for (int64_t q = 0; q < columns; q += kPanel<T>) {
          const int64_t width = panel_width<T>(columns - q);
          gemm_panel<T>(rows, width, a.patch_dim, s.mixed, block.row_length, 1, panels + q * a.patch_dim, width, s.tile, width,
                        false);
          for (int64_t i = 0; i < samples; ++i) {
            for (int64_t j = 0; j < width; j += kLanes<T>) {
              slope_only(a.activation.lower, s.tile + i * patches * width + j, width, patches, nullptr, nullptr,
                         load(s.filter_grad + i * block.e_length + q + j) * factor, s.e + i * patches * block.e_length + q + j,
                         block.e_length, kLanes<T>);
            }
          }
        }
      }

      for (int64_t d = 0; weight_grad && d < a.patch_dim; d += kPanel<T>) {
        gemm_panel<T>(grouped, a.patch_dim - d, rows, s.e, 1, block.e_length, s.mixed + d, block.row_length, weight_grad + d,
                      length, accumulate);
      }
      accumulate = true;
      for (int64_t d = 0; mixed_grad && d < a.patch_dim; d += kPanel<T>) {
        gemm_panel<T>(rows, a.patch_dim - d, columns, s.e, block.e_length, 1, weight_rows + d, length, s.mixed_grad + d,
                      block.row_length, false);
      }
      for (int64_t i = 0; mixed_grad && i < samples; ++i) {
        const T* from = s.mixed_grad + i * patches * block.row_length;
        T* to = mixed_grad + ((n + i) * a.patches + p) * a.patch_dim;
        for (int64_t r = 0; r < patches; ++r, from += block.row_length, to += a.patch_dim) {
          for (int64_t d = 0; d < a.patch_dim; ++d) to[d] = from[d];
        }
      }
    }
  }
}

}  // namespace

template <typename T>
PatchConvKernels<T> patch_conv() {
  return {panels_size<T>, pack_panels<T>, row_length<T>, rows_size<T>, pack_rows<T>, scratch_bytes<T>, forward<T>, backward<T>};
}
template PatchConvKernels<float> patch_conv();
template PatchConvKernels<double> patch_conv();

}  // namespace mixfeat::MIXFEAT_ISA
