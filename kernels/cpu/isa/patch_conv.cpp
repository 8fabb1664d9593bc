// The fused patch convolution (mix, convolve, activate, sum) and its gradients.
//
// A block of rows (sample, patch) is mixed into scratch and multiplied by one panel of filters at a time. The
// activation is applied to that tile while it is in the first-level cache, and summed over the patches. The backward
// pass does the same, or reads the slopes that forward saved, and multiplies the block E = grad * phi' by the mixed
// rows and by the weight.

#include <string.h>

#include "../kernels.h"
#include "../scratch.h"
#include "activation.h"
#include "element.h"
#include "gemm.h"

namespace mixfeat::MIXFEAT_ISA {
namespace {

// What the matrix products of elements E multiply, and the numbers that it is made of.
#if defined(__AVX512BF16__)
template <typename E>
constexpr bool kPairs = std::is_same_v<E, BFloat16>;
#else
template <typename E>
constexpr bool kPairs = false;
#endif
template <typename E>
using Factor = std::conditional_t<kPairs<E>, Pair, Compute<E>>;
template <typename E>
using Number = std::conditional_t<kPairs<E>, BFloat16, Compute<E>>;
template <typename E>
constexpr int64_t kTerms = kPairs<E> ? 2 : 1;  // numbers per factor

template <typename E>
const Factor<E>* factors(const Number<E>* numbers) {
  return reinterpret_cast<const Factor<E>*>(numbers);
}

// A row length in whole vectors that does not map successive rows onto the same cache sets.
template <typename T>
int64_t padded(int64_t columns) {
  const int64_t length = round_up(columns, kPanel<T>);
  return length * sizeof(T) % 512 == 0 ? length + kLanes<T> : length;
}

// The rows of one block: several whole samples where they fit, else a part of one sample's patches.
template <typename E>
struct Blocks {
  using T = Compute<E>;
  int64_t samples, patches;      // per block
  int64_t rows;                  // their product, with room for the last row group of the matrix product
  int64_t row_length, e_length;  // padded row lengths of the mixed input and of E

  explicit Blocks(const PatchConv<E>& a) : row_length(padded<T>(a.patch_dim)), e_length(padded<T>(a.columns)) {
    constexpr int64_t kCacheBytes = 384 << 10;  // a block's share of the second-level cache
    const int64_t fitting_rows = kCacheBytes / int64_t(sizeof(Number<E>)) / (row_length + e_length);
    const int64_t max_rows = max(48, min(fitting_rows, 240)) / kTileRows * kTileRows;
    patches = min(a.patches, max_rows);
    samples = min(max(1, max_rows / max(1, a.patches)), max(1, a.samples));
    rows = round_up(samples * patches, kTileRows);
  }
};

// The buffers of one thread. phi is the sum of scale / degree * poly and scale * linear.
template <typename E>
struct Buffers {
  using T = Compute<E>;
  Scratch scratch;
  Number<E> *mixed, *e;
  Pair *mixed_pairs, *e_pairs;  // the same in pairs of rows
  T *tile, *poly, *linear, *filter_grad, *mixed_grad;

  Buffers(const Blocks<E>& b, void* memory)
      : scratch(memory),
        mixed(scratch.take<Number<E>>(b.rows * b.row_length)),
        e(scratch.take<Number<E>>(b.rows * b.e_length)),
        mixed_pairs(scratch.take<Pair>(kPairs<E> ? b.rows / 2 * b.row_length : 0)),
        e_pairs(scratch.take<Pair>(kPairs<E> ? b.rows / 2 * b.e_length : 0)),
        tile(scratch.take<T>(b.rows * kPanel<T>)),
        poly(scratch.take<T>(b.samples * b.e_length)),
        linear(scratch.take<T>(b.samples * b.e_length)),
        filter_grad(scratch.take<T>(b.samples * b.e_length)),
        mixed_grad(scratch.take<T>(b.rows * b.row_length)) {}
};

template <typename E>
int64_t scratch_bytes(const PatchConv<E>& a) {
  return Buffers<E>(Blocks<E>(a), nullptr).scratch.bytes();
}

template <typename T>
int64_t panel_width(int64_t columns) {
  return columns > kPanel<T> ? kPanel<T> : round_up(columns, kLanes<T>);
}

// The factors of a patch.
template <typename E>
int64_t depth(const PatchConv<E>& a) {
  return (a.patch_dim + kTerms<E> - 1) / kTerms<E>;
}

template <typename E>
int64_t panels_bytes(const PatchConv<E>& a) {
  return round_up(a.columns, kLanes<Compute<E>>) * depth(a) * sizeof(Factor<E>);
}

inline float number_of(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float number_of(float x) { return x; }
inline double number_of(double x) { return x; }

// The weight is divided by the threshold. Pairs are exact only as they are: then the products are divided
// (activate_column).
template <typename E>
void pack_panels(const PatchConv<E>& a, const E* weight, void* packed) {
  using T = Compute<E>;
  const T factor = T(1 / a.activation.threshold);
  Number<E>* to = static_cast<Number<E>*>(packed);
  for (int64_t q = 0; q < a.columns; q += kPanel<T>) {
    const int64_t width = panel_width<T>(a.columns - q);
    for (int64_t d = 0; d < depth(a) * kTerms<E>; d += kTerms<E>) {
      for (int64_t j = 0; j < width; ++j) {
        for (int64_t k = d; k < d + kTerms<E>; ++k) {
          const bool valid = q + j < a.columns && k < a.patch_dim;
          if constexpr (kPairs<E>) {
            *to++ = valid ? weight[(q + j) * a.patch_dim + k] : BFloat16{0};
          } else {
            *to++ = valid ? number_of(weight[(q + j) * a.patch_dim + k]) * factor : T(0);
          }
        }
      }
    }
  }
}

template <typename E>
int64_t row_length(const PatchConv<E>& a) {
  return padded<Compute<E>>(a.patch_dim);
}

template <typename E>
int64_t weight_grad_size(const PatchConv<E>& a) {
  return round_up(a.columns, kRowGroup) * row_length(a);
}

template <typename E>
int64_t rows_bytes(const PatchConv<E>& a) {
  return (a.columns + kTerms<E> - 1) / kTerms<E> * row_length(a) * sizeof(Factor<E>);
}

template <typename E>
void pack_rows(const PatchConv<E>& a, const E* weight, void* packed) {
  const int64_t length = row_length(a);
  Number<E>* to = static_cast<Number<E>*>(packed);
  for (int64_t q = 0; q < a.columns; q += kTerms<E>) {
    for (int64_t d = 0; d < length; ++d) {
      for (int64_t k = q; k < q + kTerms<E>; ++k) {
        const bool valid = k < a.columns && d < a.patch_dim;
        if constexpr (kPairs<E>) {
          *to++ = valid ? weight[k * a.patch_dim + d] : BFloat16{0};
        } else {
          *to++ = valid ? number_of(weight[k * a.patch_dim + d]) : 0;
        }
      }
    }
  }
}

// Where to load the vector of elements k and beyond: earlier if it would pass the end and there are enough elements.
template <typename T>
int64_t vector_at(int64_t k, int64_t size) {
  return max(0, min(k, size - kLanes<T>));
}

// Samples [n, n + samples) at patches [p, p + patches), mixed with their partners, as rows of length `length`.
template <typename E>
void fill_mixed(const PatchConv<E>& a, int64_t n, int64_t samples, int64_t p, int64_t patches, Number<E>* out,
                int64_t length) {
  using T = Compute<E>;
  for (int64_t i = n; i < n + samples; ++i) {
    const E* x = a.input + i * a.sample_stride + p * a.patch_stride;
    const E* partner = a.index ? a.input + a.index[i] * a.sample_stride + p * a.patch_stride : nullptr;
    const T lam = a.index ? a.lam[i * a.lam_stride] : T(1);
    [[maybe_unused]] const Vec<T> lam_lanes = broadcast(lam), one_minus_lam = broadcast(T(1) - lam);
    for (int64_t r = 0; r < patches; ++r, x += a.patch_stride, out += length) {
      if constexpr (kPairs<E>) {
        if (partner) {
          for (int64_t k = 0; k < a.patch_dim; k += kLanes<T>) {
            const int64_t d = vector_at<T>(k, a.patch_dim), count = a.patch_dim - d;
            store_as(out + d, lam_lanes * load_first<T>(x + d, count, T(0)) +
                                  one_minus_lam * load_first<T>(partner + d, count, T(0)));
          }
        } else {
          memcpy(out, x, a.patch_dim * sizeof(E));
        }
      } else if (partner) {
        for (int64_t d = 0; d < a.patch_dim; ++d) out[d] = lam * number_of(x[d]) + (T(1) - lam) * number_of(partner[d]);
      } else {
        for (int64_t d = 0; d < a.patch_dim; ++d) out[d] = number_of(x[d]);
      }
      for (int64_t d = a.patch_dim; d < length; ++d) out[d] = {};
      if (partner) partner += a.patch_stride;
    }
  }
}

// Pairs of `count` rows of `length` numbers, in panels of `width` columns; a row of zeros follows an odd last one.
inline void pair_rows(const BFloat16* rows, int64_t count, int64_t length, int64_t width, Pair* out) {
  for (int64_t q = 0; q < length; q += width) {
    const int64_t end = min(length, q + width);
    for (int64_t r = 0; r < count; r += 2, out += width) {
      const BFloat16* row = rows + r * length;
      for (int64_t j = q; j < end; j += kLanes<float>) {
        const Bits second = r + 1 < count ? load_bits(row + length + j) << 16 : Bits{};
        *reinterpret_cast<IntegersOf<uint32_t, float>::unaligned*>(out + j - q) = load_bits(row + j) | second;
      }
    }
  }
}

// Works on one column of vectors of a tile of products, over `rows` patches of one sample. With kValue it adds the two
// parts of phi to *poly and *linear; with kSlope it writes factor * (phi' in units of scale / threshold) to the first
// `count` columns of `out`. t is the product, with kScaled times `inverse`.
template <typename T, typename Out, int kDegree, bool kUpper, bool kValue, bool kSlope, bool kScaled>
void activate_column(const Polynomial& p, Vec<T> inverse, const T* tile, int64_t width, int64_t rows, T* poly,
                     T* linear, Vec<T> factor, Out* out, int64_t length, int64_t count) {
  const Activation<T, kDegree, kUpper> phi(p);
  Vec<T> poly_sum{}, linear_sum{};
  if (kValue) {
    poly_sum = load(poly);
    linear_sum = load(linear);
  }
  for (int64_t r = 0; r < rows; ++r) {
    Vec<T> t = load(tile + r * width);
    if (kScaled) t *= inverse;
    const Vec<T> clamped = phi.clamp_min(t), u = phi.clamp_max(clamped);
    if (kValue) phi.add_parts(t, clamped, u, poly_sum, linear_sum);
    if (kSlope) store_first<T>(out + r * length, count, phi.slope(t, u) * factor);
  }
  if (kValue) {
    store(poly, poly_sum);
    store(linear, linear_sum);
  }
}

template <typename E, typename Out, bool kValue, bool kSlope>
auto activate_column_of(const Polynomial& p) {
  return instance(p, [](auto degree, auto upper) {
    return &activate_column<Compute<E>, Out, decltype(degree)::value, decltype(upper)::value, kValue, kSlope,
                            kPairs<E>>;
  });
}

template <typename E, typename T = Compute<E>>
void forward(const PatchConv<E>& a, const void* panels, int64_t begin, int64_t end, T* logits, E* slope, int64_t saved,
             void* scratch) {
  const Blocks<E> block(a);
  const Buffers<E> s(block, scratch);
  const int64_t columns = a.columns;
  const auto value = activate_column_of<E, E, true, false>(a.activation);
  const auto value_and_slope = activate_column_of<E, E, true, true>(a.activation);
  const Vec<T> inverse = broadcast(T(1 / a.activation.threshold));
  const Vec<T> factor = broadcast(T(a.activation.scale / a.activation.threshold));

  for (int64_t n = begin; n < end; n += block.samples) {
    const int64_t samples = min(block.samples, end - n);
    for (int64_t j = 0; j < samples * block.e_length; ++j) s.poly[j] = s.linear[j] = 0;
    for (int64_t p = 0; p < a.patches; p += block.patches) {
      const int64_t patches = min(block.patches, a.patches - p), rows = samples * patches;
      fill_mixed(a, n, samples, p, patches, s.mixed, block.row_length);
      for (int64_t q = 0; q < columns; q += kPanel<T>) {
        const int64_t width = panel_width<T>(columns - q);
        gemm_panel<Factor<E>>(rows, width, depth(a), factors<E>(s.mixed), block.row_length / kTerms<E>, 1,
                              static_cast<const Factor<E>*>(panels) + q * depth(a), width, s.tile, width, false);
        for (int64_t i = 0; i < samples; ++i) {
          const bool save = n + i < saved;
          E* out = save ? slope + ((n + i) * a.patches + p) * columns + q : nullptr;
          for (int64_t j = 0; j < width; j += kLanes<T>) {
            (save ? value_and_slope : value)(a.activation, inverse, s.tile + i * patches * width + j, width, patches,
                                             s.poly + i * block.e_length + q + j, s.linear + i * block.e_length + q + j,
                                             factor, out + j, columns, columns - q - j);
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

template <typename E, typename T = Compute<E>>
void backward(const PatchConv<E>& a, const void* panels, const void* weight_rows, int64_t begin, int64_t end,
              const T* grad, const E* slope, int64_t saved, T* weight_grad, E* mixed_grad, void* scratch) {
  const Blocks<E> block(a);
  const Buffers<E> s(block, scratch);
  const int64_t columns = a.columns, grouped = round_up(columns, kRowGroup), length = row_length(a);
  const auto slope_only = activate_column_of<E, Number<E>, false, true>(a.activation);
  const Vec<T> inverse = broadcast(T(1 / a.activation.threshold));
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
          const E* from = slope + ((n + i) * a.patches + p) * columns;
          Number<E>* e = s.e + i * patches * block.e_length;
          for (int64_t r = 0; r < patches; ++r, from += columns, e += block.e_length) {
            if constexpr (kPairs<E>) {
              for (int64_t k = 0; k < columns; k += kLanes<T>) {
                const int64_t q = vector_at<T>(k, columns);
                store_as(e + q, load_first<T>(from + q, columns - q, T(0)) * load(g + q));
              }
            } else {
              for (int64_t q = 0; q < columns; ++q) e[q] = number_of(from[q]) * g[q];
            }
          }
        }
      } else {
        for (int64_t q = 0; q < columns; q += kPanel<T>) {
          const int64_t width = panel_width<T>(columns - q);
          gemm_panel<Factor<E>>(rows, width, depth(a), factors<E>(s.mixed), block.row_length / kTerms<E>, 1,
                                static_cast<const Factor<E>*>(panels) + q * depth(a), width, s.tile, width, false);
          for (int64_t i = 0; i < samples; ++i) {
            for (int64_t j = 0; j < width; j += kLanes<T>) {
              slope_only(a.activation, inverse, s.tile + i * patches * width + j, width, patches, nullptr, nullptr,
                         load(s.filter_grad + i * block.e_length + q + j) * factor,
                         s.e + i * patches * block.e_length + q + j, block.e_length, kLanes<T>);
            }
          }
        }
      }

      if constexpr (kPairs<E>) {
        if (columns % 2) {
          for (int64_t r = 0; r < rows; ++r) s.e[r * block.e_length + columns] = {};
        }
        if (weight_grad) {
          pair_rows(s.mixed, rows, block.row_length, kPanel<T>, s.mixed_pairs);
          pair_rows(s.e, rows, block.e_length, block.e_length, s.e_pairs);
        }
      }
      for (int64_t d = 0; weight_grad && d < a.patch_dim; d += kPanel<T>) {
        if constexpr (kPairs<E>) {
          const int64_t pairs = (rows + 1) / 2;
          gemm_panel<Pair>(grouped, a.patch_dim - d, pairs, s.e_pairs, 1, block.e_length, s.mixed_pairs + d * pairs,
                           kPanel<T>, weight_grad + d, length, accumulate);
        } else {
          gemm_panel<T>(grouped, a.patch_dim - d, rows, s.e, 1, block.e_length, s.mixed + d, block.row_length,
                        weight_grad + d, length, accumulate);
        }
      }
      accumulate = true;
      for (int64_t d = 0; mixed_grad && d < a.patch_dim; d += kPanel<T>) {
        gemm_panel<Factor<E>>(rows, a.patch_dim - d, (columns + kTerms<E> - 1) / kTerms<E>, factors<E>(s.e),
                              block.e_length / kTerms<E>, 1, static_cast<const Factor<E>*>(weight_rows) + d, length,
                              s.mixed_grad + d, block.row_length, false);
      }
      for (int64_t i = 0; mixed_grad && i < samples; ++i) {
        const T* from = s.mixed_grad + i * patches * block.row_length;
        E* to = mixed_grad + ((n + i) * a.patches + p) * a.patch_dim;
        for (int64_t r = 0; r < patches; ++r, from += block.row_length, to += a.patch_dim) {
          if constexpr (std::is_same_v<E, T>) {
            for (int64_t d = 0; d < a.patch_dim; ++d) to[d] = from[d];
          } else {
            for (int64_t k = 0; k < a.patch_dim; k += kLanes<T>) {
              const int64_t d = vector_at<T>(k, a.patch_dim);
              store_first<T>(to + d, a.patch_dim - d, load(from + d));
            }
          }
        }
      }
    }
  }
}

}  // namespace

template <typename E>
PatchConvKernels<E> patch_conv() {
  return {panels_bytes<E>,     pack_panels<E>,   rows_bytes<E>, pack_rows<E>, row_length<E>,
          weight_grad_size<E>, scratch_bytes<E>, forward<E>,    backward<E>};
}
#if !defined(__AVX512BF16__)  // which AVX-512 serves as well
template PatchConvKernels<float> patch_conv();
template PatchConvKernels<double> patch_conv();
#endif
template PatchConvKernels<BFloat16> patch_conv();

}  // namespace mixfeat::MIXFEAT_ISA
