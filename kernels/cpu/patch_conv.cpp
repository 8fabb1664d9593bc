// The fused patch convolution (mix, convolve, activate, sum) and its gradients; compiled once per instruction set into the
// namespace MIXFEAT_ISA. Nothing here may come from the standard library's templates: the linker keeps one copy of those,
// and it could be one that this processor cannot run.
//
// A block of rows (sample, patch) is mixed into scratch and multiplied by one panel of filters at a time; the activation
// is applied to that tile while it is in the first-level cache and added up over the patches. The backward pass does the same,
// or reads the slopes that forward kept, and multiplies the block E = grad * phi' by the mixed rows and by the weight.

#include "patch_conv.h"

#include "activation.h"
#include "gemm.h"

namespace mixfeat {
namespace MIXFEAT_ISA {
namespace {

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A row length in whole vectors that does not map successive rows onto the same cache sets.
template <typename T>
int64_t padded(int64_t columns) {
  const int64_t length = round_up(columns, kPanel<T>);
  return length * sizeof(T) % 512 == 0 ? length + kLanes<T> : length;
}

// How the rows of a range are cut: whole samples where they fit, else a part of one sample's patches.
template <typename T>
struct Blocks {
  int64_t samples, patches;  // per block
  int64_t rows;              // their product, with room for a last group of the matrix product
  int64_t features, columns; // padded row lengths of the mixed input and of E

  explicit Blocks(const PatchConv<T>& a) : features(padded<T>(a.features)), columns(padded<T>(a.columns())) {
    constexpr int64_t kCacheBytes = 384 << 10;  // what a block may take of the second-level cache
    const int64_t fit = kCacheBytes / int64_t(sizeof(T)) / (features + columns);
    const int64_t most = larger(48, smaller(fit, 240)) / kTileRows * kTileRows;
    patches = smaller(a.patches, most);
    samples = smaller(larger(1, most / larger(1, a.patches)), larger(1, a.samples));
    rows = round_up(samples * patches, kTileRows);
  }
};

// The scratch of one thread, in order.
template <typename T>
struct Scratch {
  T *mixed, *tile, *curve, *line, *filter_grad, *e, *mixed_grad;
  int64_t size;

  Scratch(const Blocks<T>& b, T* base) : size(0) {
    auto take = [&](int64_t count) {
      T* p = base + size;
      size += round_up(count, 64 / sizeof(T));
      return p;
    };
    mixed = take(b.rows * b.features);
    tile = take(b.rows * kPanel<T>);
    curve = take(b.samples * b.columns);
    line = take(b.samples * b.columns);
    filter_grad = take(b.samples * b.columns);
    e = take(b.rows * b.columns);
    mixed_grad = take(b.rows * b.features);
  }
};

template <typename T>
int64_t scratch_size(const PatchConv<T>& a) {
  return Scratch<T>(Blocks<T>(a), nullptr).size;
}

template <typename T>
int64_t panel_width(int64_t columns) {
  return columns > kPanel<T> ? kPanel<T> : round_up(columns, kLanes<T>);
}

template <typename T>
int64_t panels_size(const PatchConv<T>& a) {
  return round_up(a.columns(), kLanes<T>) * a.features;
}

template <typename T>
void pack_panels(const PatchConv<T>& a, const T* weight, T* panels) {
  const T factor = T(1 / a.activation.threshold);
  for (int64_t q = 0; q < a.columns(); q += kPanel<T>) {
    const int64_t width = panel_width<T>(a.columns() - q), valid = smaller(kPanel<T>, a.columns() - q);
    for (int64_t d = 0; d < a.features; ++d, panels += width) {
      for (int64_t j = 0; j < valid; ++j) panels[j] = weight[(q + j) * a.features + d] * factor;
      for (int64_t j = valid; j < width; ++j) panels[j] = 0;
    }
  }
}

template <typename T>
int64_t row_length(const PatchConv<T>& a) {
  return padded<T>(a.features);
}

template <typename T>
int64_t rows_size(const PatchConv<T>& a) {
  return round_up(a.columns(), kRowGroup) * row_length(a);
}

template <typename T>
void pack_rows(const PatchConv<T>& a, const T* weight, T* rows) {
  const int64_t length = row_length(a);
  for (int64_t q = 0; q < a.columns(); ++q) {
    for (int64_t d = 0; d < a.features; ++d) rows[q * length + d] = weight[q * a.features + d];
    for (int64_t d = a.features; d < length; ++d) rows[q * length + d] = 0;
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
        for (int64_t d = 0; d < a.features; ++d) out[d] = lam * x[d] + (T(1) - lam) * partner[d];
        partner += a.patch_stride;
      } else {
        for (int64_t d = 0; d < a.features; ++d) out[d] = x[d];
      }
      for (int64_t d = a.features; d < length; ++d) out[d] = 0;
    }
  }
}

template <typename T>
void store_first(T* p, Vec<T> v, int64_t count) {
  if (count >= kLanes<T>) {
    store(p, v);
  } else {
    for (int64_t j = 0; j < count; ++j) p[j] = v[j];
  }
}

// One column of vectors of a tile of t over `rows` patches of one sample. Adds the two parts of phi up into *curve and *line
// if kValue, and writes factor * (phi' in units of scale / threshold) to `out` (first `count` columns) if kSlope.
template <typename T, int kDegree, bool kUpper, bool kValue, bool kSlope>
void activate_column(bool lower, const T* tile, int64_t width, int64_t rows, T* curve, T* line, Vec<T> factor, T* out,
                     int64_t length, int64_t count) {
  const Activation<T, kDegree, kUpper> phi(lower);
  Vec<T> curves{}, lines{};
  if (kValue) {
    curves = load(curve);
    lines = load(line);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const Vec<T> t = load(tile + r * width), raised = phi.raise(t), u = phi.cut(raised);
    if (kValue) {
      curves += power<kDegree, T>(u);
      if (kUpper) lines += raised - u;
    }
    if (kSlope) store_first(out + r * length, phi.slope(t, u) * factor, count);
  }
  if (kValue) {
    store(curve, curves);
    store(line, lines);
  }
}

template <typename T>
using ActivateColumn = void (*)(bool, const T*, int64_t, int64_t, T*, T*, Vec<T>, T*, int64_t, int64_t);

template <typename T, bool kUpper, bool kValue, bool kSlope, int... kDegrees>
ActivateColumn<T> pick(int64_t degree, Degrees<kDegrees...>) {
  constexpr ActivateColumn<T> table[] = {activate_column<T, kDegrees, kUpper, kValue, kSlope>...};
  return table[degree - 1];
}

template <typename T, bool kValue, bool kSlope>
ActivateColumn<T> activation_of(const Polynomial& p) {
  return p.upper ? pick<T, true, kValue, kSlope>(p.degree, AllDegrees())
                 : pick<T, false, kValue, kSlope>(p.degree, AllDegrees());
}

template <typename T>
void forward(const PatchConv<T>& a, const T* panels, int64_t begin, int64_t end, T* logits, T* slope, int64_t saved,
             T* scratch) {
  const Blocks<T> block(a);
  const Scratch<T> s(block, scratch);
  const int64_t columns = a.columns();
  const ActivateColumn<T> value = activation_of<T, true, false>(a.activation);
  const ActivateColumn<T> value_and_slope = activation_of<T, true, true>(a.activation);
  const Vec<T> factor = broadcast(T(a.activation.scale / a.activation.threshold));

  for (int64_t n = begin; n < end; n += block.samples) {
    const int64_t samples = smaller(block.samples, end - n);
    for (int64_t j = 0; j < samples * block.columns; ++j) s.curve[j] = s.line[j] = 0;
    for (int64_t p = 0; p < a.patches; p += block.patches) {
      const int64_t patches = smaller(block.patches, a.patches - p), rows = samples * patches;
      fill_mixed(a, n, samples, p, patches, s.mixed, block.features);
      for (int64_t q = 0; q < columns; q += kPanel<T>) {
        const int64_t width = panel_width<T>(columns - q);
        gemm_panel<T>(rows, width, a.features, s.mixed, block.features, 1, panels + q * a.features, width, s.tile, width,
                      false);
        for (int64_t i = 0; i < samples; ++i) {
          const bool save = n + i < saved;
          T* out = save ? slope + ((n + i) * a.patches + p) * columns + q : nullptr;
          for (int64_t j = 0; j < width; j += kLanes<T>) {
            (save ? value_and_slope : value)(a.activation.lower, s.tile + i * patches * width + j, width, patches,
                                             s.curve + i * block.columns + q + j, s.line + i * block.columns + q + j,
                                             factor, out + j, columns, columns - q - j);
          }
        }
      }
    }
    const T scale = T(a.activation.scale), curve_scale = T(a.activation.scale / a.activation.degree);
    for (int64_t i = 0; i < samples; ++i) {
      const T *curve = s.curve + i * block.columns, *line = s.line + i * block.columns;
      for (int64_t run = 0; run < a.runs; ++run) {
        T* out = logits + (run * a.samples + n + i) * a.classes;
        for (int64_t c = 0; c < a.classes; ++c) {
          T curves = 0, lines = 0;
          for (int64_t m = 0; m < a.filters; ++m) {
            curves += *curve++;
            lines += *line++;
          }
          out[c] = curve_scale * curves + scale * lines;
        }
      }
    }
  }
}

template <typename T>
void backward(const PatchConv<T>& a, const T* panels, const T* weight_rows, int64_t begin, int64_t end, const T* grad,
              const T* slope, int64_t saved, T* weight_grad, T* mixed_grad, T* scratch) {
  const Blocks<T> block(a);
  const Scratch<T> s(block, scratch);
  const int64_t columns = a.columns(), grouped = round_up(columns, kRowGroup), length = row_length(a);
  const ActivateColumn<T> slope_only = activation_of<T, false, true>(a.activation);
  const Vec<T> factor = broadcast(T(a.activation.scale / a.activation.threshold));
  bool accumulate = false;

  for (int64_t n = begin; n < end; n += block.samples) {
    const int64_t samples = smaller(block.samples, end - n);
    for (int64_t i = 0; i < samples; ++i) {  // the logits' gradient, once per filter
      T* g = s.filter_grad + i * block.columns;
      for (int64_t run = 0; run < a.runs; ++run) {
        const T* from = grad + (run * a.samples + n + i) * a.classes;
        for (int64_t c = 0; c < a.classes; ++c) {
          for (int64_t m = 0; m < a.filters; ++m) *g++ = from[c];
        }
      }
      for (int64_t q = columns; q < block.columns; ++q) *g++ = 0;
    }
    for (int64_t p = 0; p < a.patches; p += block.patches) {
      const int64_t patches = smaller(block.patches, a.patches - p), rows = samples * patches;
      if (weight_grad || n + samples > saved) fill_mixed(a, n, samples, p, patches, s.mixed, block.features);

      if (n + samples <= saved) {
        for (int64_t i = 0; i < samples; ++i) {
          const T* g = s.filter_grad + i * block.columns;
          const T* from = slope + ((n + i) * a.patches + p) * columns;
          T* e = s.e + i * patches * block.columns;
          for (int64_t r = 0; r < patches; ++r, from += columns, e += block.columns) {
            for (int64_t q = 0; q < columns; ++q) e[q] = from[q] * g[q];
          }
        }
      } else {
        for (int64_t q = 0; q < columns; q += kPanel<T>) {
          const int64_t width = panel_width<T>(columns - q);
          gemm_panel<T>(rows, width, a.features, s.mixed, block.features, 1, panels + q * a.features, width, s.tile,
                        width, false);
          for (int64_t i = 0; i < samples; ++i) {
            for (int64_t j = 0; j < width; j += kLanes<T>) {
              slope_only(a.activation.lower, s.tile + i * patches * width + j, width, patches, nullptr, nullptr,
                         load(s.filter_grad + i * block.columns + q + j) * factor,
                         s.e + i * patches * block.columns + q + j, block.columns, kLanes<T>);
            }
          }
        }
      }

      for (int64_t d = 0; weight_grad && d < a.features; d += kPanel<T>) {
        gemm_panel<T>(grouped, a.features - d, rows, s.e, 1, block.columns, s.mixed + d, block.features, weight_grad + d,
                      length, accumulate);
      }
      accumulate = true;
      for (int64_t d = 0; mixed_grad && d < a.features; d += kPanel<T>) {
        gemm_panel<T>(rows, a.features - d, columns, s.e, block.columns, 1, weight_rows + d, length, s.mixed_grad + d,
                      block.features, false);
      }
      for (int64_t i = 0; mixed_grad && i < samples; ++i) {
        const T* from = s.mixed_grad + i * patches * block.features;
        T* to = mixed_grad + ((n + i) * a.patches + p) * a.features;
        for (int64_t r = 0; r < patches; ++r, from += block.features, to += a.features) {
          for (int64_t d = 0; d < a.features; ++d) to[d] = from[d];
        }
      }
    }
  }
}

template <typename T>
constexpr PatchConvKernels<T> kernels() {
  return {panels_size<T>, pack_panels<T>, row_length<T>, rows_size<T>, pack_rows<T>,
          scratch_size<T>, forward<T>, backward<T>};
}

}  // namespace

const PatchConvKernels<float> patch_conv_float = kernels<float>();
const PatchConvKernels<double> patch_conv_double = kernels<double>();

}  // namespace MIXFEAT_ISA
}  // namespace mixfeat
