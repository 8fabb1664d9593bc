// Full-batch gradient descent on two-layer patch-wise networks: a block trains one network, all steps in one launch.
//
//   t_ij,f = (lam s_i,f + (1-lam) s_j,f) / threshold,  s_i,f = <w, x_i>      f: a feature, a filter at a patch
//   g_ijc  = sum_f scale (u^q / q + max(t - 1, 0) [UPPER]),  u = t clamped to at least 0 [LOWER] and at most 1 [UPPER]
//   D_ijc  = v/N^2 (softmax(g_ij)_c - lam [c = y_i] - (1-lam) [c = y_j])     v: the weight of the node lam
//   dL/ds_i,f = scale/threshold sum_j (lam D_ijc u_ij,f^(q-1) + (1-lam) D_jic u_ji,f^(q-1)),  dL/dw = dL/ds^T x
//   b = momentum b + dL/dw + weight_decay w,  w -= lr b
//
// Everything of a network stays in shared memory from step to step; the samples are read from global memory. A step is
// one pass for each node and each band of rows of pairs that fits shared memory beside the pre-activations:
//   1. convolve:  s, as a = lam s / threshold; so t_ij = a_i + ratio a_j with ratio = (1-lam) / lam
//   2. logits:    a thread owns a tile of T x T pairs of one class and loops over the features
//   3. softmax:   a thread owns a pair and writes D over its logits
//   4. gradient:  a thread owns a feature (or its columns in one chunk) and loops over the pairs: it evaluates each
//                 pair once for both samples, whose sums stay in registers; they are written over a, or to `ds`
//   5. dL/dw:     a thread owns four entries of some filters, and a group of patches; logits make room for the parts
//   6. update, or a sum over passes
// At lam = 1/2 the pair (j, i) is the pair (i, j): tiles below the diagonal are left out (SYMMETRIC). ERM has no pairs.
// No atomics and no exchange between threads but through barriers: results repeat bit for bit.
//
// A network with a pre-activation that is not finite, or beyond 2^96, becomes NaN, in its loss and in all its weights;
// so does one with a target out of range. Clamps hide NaN, so pre-activations are tested as they are computed.
//
// Macros: the sizes NUM_SAMPLES, NUM_PATCHES, PATCH_DIM, NUM_CLASSES, FILTERS_PER_CLASS; the activation DEGREE, LOWER,
// UPPER; ERM (0, 1) and MOMENTUM (0, 1); NUM_PASSES, of which the first SYMMETRIC_PASSES are at lam = 1/2; the layout
// TILE, THREADS, BAND_TILES, CHUNK_TILES, FILTER_GROUP, PATCH_GROUPS, SHARED_FLOATS, chosen by gradient_descent.py.

constexpr int N = NUM_SAMPLES, P = NUM_PATCHES, C = NUM_CLASSES, M = FILTERS_PER_CLASS, F = P * M, T = TILE;
constexpr int B = (N + T - 1) / T;                       // tiles along a side
constexpr int ROWS = B * T;                              // samples with padding, which is zero and counts for nothing
constexpr int D4 = (PATCH_DIM + 3) / 4, D = 4 * D4;      // a patch, padded to whole float4s
constexpr int W = C * M * D;
constexpr int STRIDE = ROWS | 1;                         // of a feature's samples; odd: no bank conflicts
constexpr int TILE_STRIDE = (T * T + 3) / 4 * 4;
constexpr int CLASS_STRIDE = ERM ? N : BAND_TILES * TILE_STRIDE;  // of a class's logits
constexpr int CHUNKS = (B + CHUNK_TILES - 1) / CHUNK_TILES;
constexpr int FILTER_GROUPS = (M + FILTER_GROUP - 1) / FILTER_GROUP;
constexpr int GROUP_PATCHES = (P + PATCH_GROUPS - 1) / PATCH_GROUPS;

__device__ constexpr int round_up(int size) { return (size + 3) / 4 * 4; }
constexpr int LOGITS_SIZE = C * CLASS_STRIDE > PATCH_GROUPS * W ? round_up(C * CLASS_STRIDE) : PATCH_GROUPS * W;
constexpr int S_SIZE = round_up(C * F * STRIDE);
constexpr int FILTERS_OFFSET = LOGITS_SIZE;
constexpr int MOMENTUM_OFFSET = FILTERS_OFFSET + W;
constexpr int GRAD_OFFSET = MOMENTUM_OFFSET + (MOMENTUM ? W : 0);
constexpr int LOSS_OFFSET = GRAD_OFFSET + (NUM_PASSES > 1 ? W : 0);
constexpr int S_OFFSET = LOSS_OFFSET + THREADS;
constexpr int DS_OFFSET = CHUNKS > 1 ? S_OFFSET + S_SIZE : S_OFFSET;
constexpr int TARGET_OFFSET = DS_OFFSET + S_SIZE;
constexpr int PLACES_OFFSET = TARGET_OFFSET + round_up(ROWS);
constexpr int PLACES_SIZE = SYMMETRIC_PASSES ? B * (B + 1) / 2 : 0;
static_assert(PLACES_OFFSET + PLACES_SIZE == SHARED_FLOATS, "the host counts shared memory differently");
static_assert(ERM || BAND_TILES >= B, "a band holds a row of tiles");
static_assert(THREADS % 32 == 0 && PATCH_GROUPS <= P, "layout");

// max(t - 1, 0) is a clamp to [0, 1] of (t - 1) SHRINK, which the addition does for nothing; below LARGEST it is exact
constexpr float SHRINK = 0x1p-100f, LARGEST = 0x1p96f;

#ifdef __CUDACC__
// Volatile, or the compiler would compute the indices of all phases before the first step and keep them in registers
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
// __saturatef(a + b) is two instructions, these are one
__device__ __forceinline__ float add_sat(float a, float b) {
  float sum;
  asm("add.sat.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
  return sum;
}
__device__ __forceinline__ float fma_sat(float a, float b, float c) {
  float sum;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(sum) : "f"(a), "f"(b), "f"(c));
  return sum;
}
#endif

// Calls task(0) to task(TASKS - 1), a thread each
template <int TASKS, class Task>
__device__ __forceinline__ void share_out(Task task) {
  if constexpr (TASKS <= THREADS) {  // the compiler does not see by itself that this is no loop
    const int k = thread_index();
    if (k < TASKS) task(k);
  } else {
    for (int k = thread_index(); k < TASKS; k += THREADS) task(k);
  }
}

// u^E with few products
template <int E>
__device__ __forceinline__ float power(float u) {
  if constexpr (E == 0) {
    return 1.f;
  } else if constexpr (E == 1) {
    return u;
  } else if constexpr (E % 2 == 0) {
    const float root = power<E / 2>(u);
    return root * root;
  } else if constexpr (E % 3 == 0) {
    const float root = power<E / 3>(u);
    return root * root * root;
  } else {
    return power<E - 1>(u) * u;
  }
}

// u^E = u^head(E) u^(E - head(E)): the last product is left to a fused multiply-add
__device__ constexpr int head(int exponent) {
  return exponent <= 1 ? 0 : exponent % 2 == 0 ? exponent / 2 : exponent % 3 == 0 ? exponent / 3 : 1;
}

// sum + factor u^E
template <int E>
__device__ __forceinline__ float add_power(float sum, float factor, float u) {
  return sum + factor * power<head(E)>(u) * power<E - head(E)>(u);
}

__device__ __forceinline__ float clamp(float t) {
  if (LOWER) t = fmaxf(t, 0.f);
  if (UPPER) t = fminf(t, 1.f);
  return t;
}

// u of a pair: a + ratio b, clamped
template <bool SYMMETRIC>
__device__ __forceinline__ float mixed(float a, float b, float ratio) {
  if (LOWER && UPPER) return SYMMETRIC ? add_sat(a, b) : fma_sat(ratio, b, a);
  return clamp(SYMMETRIC ? a + b : a + ratio * b);
}

// A node and a band of rows of tiles
struct Pass {
  float lam;
  float ratio;                    // (1-lam) / lam: t_ij = a_i + ratio a_j
  float to_t;                     // lam / threshold: a = to_t s
  float share;                    // of the loss, for each ordered pair
  int first_row, last_row;        // of tiles, the last one excluded
  int first_tile, tiles;
};
struct Passes {
  Pass all[NUM_PASSES];
};

// The number of tiles in rows before `row`
template <bool SYMMETRIC>
__device__ __forceinline__ int tiles_before(int row) {
  return SYMMETRIC ? row * B - row * (row - 1) / 2 : row * B;
}

template <bool SYMMETRIC>
__device__ __forceinline__ void place(const int* places, int tile, int& I, int& J) {
  if (SYMMETRIC) {
    I = places[tile] & 0xffff;
    J = places[tile] >> 16;
  } else {
    I = tile / B;
    J = tile % B;
  }
}

// Makes the loss NaN where a pre-activation is not finite or too large
__device__ __forceinline__ void convolve(const float4* x, const float* w, float to_t, float* s, float& loss) {
  share_out<C * FILTER_GROUPS * P * B>([&](int k) {
    const int c = k % C, m0 = k / C % FILTER_GROUPS * FILTER_GROUP, p = k / (C * FILTER_GROUPS) % P;
    const int n0 = k / (C * FILTER_GROUPS * P) * T;
    const float4 *samples = x + (p * ROWS + n0) * D4, *filters = reinterpret_cast<const float4*>(w) + (c * M + m0) * D4;
    float sum[FILTER_GROUP][T] = {};
    bool finite = true;
#pragma unroll 1
    for (int d = 0; d < D4; ++d) {
      float4 xs[T];
#pragma unroll
      for (int i = 0; i < T; ++i) xs[i] = __ldg(samples + i * D4 + d);
#pragma unroll
      for (int m = 0; m < FILTER_GROUP; ++m) {
        if (M % FILTER_GROUP && m0 + m >= M) break;
        const float4 ws = filters[m * D4 + d];
#pragma unroll
        for (int i = 0; i < T; ++i)
          sum[m][i] = fmaf(ws.w, xs[i].w, fmaf(ws.z, xs[i].z, fmaf(ws.y, xs[i].y, fmaf(ws.x, xs[i].x, sum[m][i]))));
      }
    }
#pragma unroll
    for (int m = 0; m < FILTER_GROUP; ++m) {
      if (M % FILTER_GROUP && m0 + m >= M) break;
#pragma unroll
      for (int i = 0; i < T; ++i) {
        const float a = sum[m][i] * to_t;
        s[(c * F + p * M + m0 + m) * STRIDE + n0 + i] = a;
        finite &= fabsf(a) < LARGEST;
      }
    }
    if (!finite) loss = nanf("");
  });
}

template <bool SYMMETRIC>
__device__ __forceinline__ void pair_logits(
    const Pass& pass, const float* s, const int* places, float to_logit, float* logits) {
  const float ratio_shrunk = pass.ratio * SHRINK;
  for (int k = thread_index(); k < C * pass.tiles; k += THREADS) {
    const int c = k / pass.tiles, tile = k % pass.tiles;
    int I, J;
    place<SYMMETRIC>(places, pass.first_tile + tile, I, J);
    const float *rows = s + c * F * STRIDE + I * T, *columns = s + c * F * STRIDE + J * T;
    float sum[T][T] = {};
#pragma unroll 2
    for (int f = 0; f < F; ++f) {
      float a[T], b[T], above[T];
#pragma unroll
      for (int i = 0; i < T; ++i) {
        a[i] = rows[f * STRIDE + i];
        b[i] = columns[f * STRIDE + i];
        above[i] = (a[i] - 1.f) * SHRINK;
      }
#pragma unroll
      for (int i = 0; i < T; ++i)
#pragma unroll
        for (int j = 0; j < T; ++j) {
          sum[i][j] = add_power<DEGREE>(sum[i][j], 1.f, mixed<SYMMETRIC>(a[i], b[j], pass.ratio));
          if (UPPER) sum[i][j] += fma_sat(b[j], SYMMETRIC ? SHRINK : ratio_shrunk, above[i]) * (DEGREE / SHRINK);
        }
    }
    float* out = logits + c * CLASS_STRIDE + tile * TILE_STRIDE;
#pragma unroll
    for (int i = 0; i < T; ++i)
#pragma unroll
      for (int j = 0; j < T; ++j) out[i * T + j] = sum[i][j] * to_logit;
  }
}

// Cross-entropy to lam [c = yi] + (1-lam) [c = yj], times weight; writes weight (softmax - label) over the logits
__device__ __forceinline__ float cross_entropy(float* logits, int yi, int yj, float lam, float weight) {
  float top = logits[0], total = 0.f;
#pragma unroll 4
  for (int c = 1; c < C; ++c) top = fmaxf(top, logits[c * CLASS_STRIDE]);
  const bool known = yi >= 0 && yj >= 0;
  const float below_i = known ? top - logits[yi * CLASS_STRIDE] : nanf("");
  const float below_j = known ? top - logits[yj * CLASS_STRIDE] : nanf("");
#pragma unroll 4
  for (int c = 0; c < C; ++c) {
    const float e = expf(logits[c * CLASS_STRIDE] - top);
    logits[c * CLASS_STRIDE] = e;
    total += e;
  }
  const float factor = weight / total, weight_i = lam * weight, weight_j = weight - weight_i;
#pragma unroll 4
  for (int c = 0; c < C; ++c) {
    float& at = logits[c * CLASS_STRIDE];
    at = at * factor - (c == yi ? weight_i : 0.f) - (c == yj ? weight_j : 0.f);
  }
  return weight * (logf(total) + lam * below_i + (1.f - lam) * below_j);
}

// Adds this thread's part of the loss
template <bool SYMMETRIC>
__device__ __forceinline__ void pair_softmax(
    const Pass& pass, const int* target, const int* places, float* logits, float& loss) {
  for (int k = thread_index(); k < pass.tiles * T * T; k += THREADS) {
    const int tile = k / (T * T), e = k % (T * T);
    int I, J;
    place<SYMMETRIC>(places, pass.first_tile + tile, I, J);
    const int i = I * T + e / T, j = J * T + e % T;
    float* at = logits + tile * TILE_STRIDE + e;
    // Symmetric pairs count for both orders in the loss. In D they count once, as the gradient goes to both samples.
    const bool counts = i < N && j < N && (!SYMMETRIC || i <= j);
    const float weight = !counts ? 0.f : SYMMETRIC && i == j ? 0.5f * pass.share : pass.share;
    const float part = cross_entropy(at, target[i], target[j], pass.lam, SYMMETRIC ? 2.f * weight : weight);
    if (counts) loss += part;
  }
}

// Adds the slopes of T x T pairs, weighted by D, to the sums of their rows and of their columns
template <bool SYMMETRIC>
__device__ __forceinline__ void add_slopes(
    const float (&a)[T], const float* column, const float* tile, float ratio, float (&row)[T], float (&col)[T]) {
  float b[T], d[TILE_STRIDE];
#pragma unroll
  for (int v = 0; v < TILE_STRIDE; v += 4) {
    const float4 four = *reinterpret_cast<const float4*>(tile + v);
    d[v] = four.x, d[v + 1] = four.y, d[v + 2] = four.z, d[v + 3] = four.w;
  }
#pragma unroll
  for (int j = 0; j < T; ++j) b[j] = column[j];
#pragma unroll
  for (int i = 0; i < T; ++i)
#pragma unroll
    for (int j = 0; j < T; ++j) {
      const float u = mixed<SYMMETRIC>(a[i], b[j], ratio);
      const float dij = DEGREE == 1 && LOWER && !(u > 0.f) ? 0.f : d[i * T + j];
      row[i] = add_power<DEGREE - 1>(row[i], dij, u);
      col[j] = add_power<DEGREE - 1>(col[j], dij, u);
    }
}

template <bool SYMMETRIC>
__device__ __forceinline__ void pair_gradient(
    const Pass& pass, const float* logits, const float* s, float scale, float* ds) {
  share_out<CHUNKS * C * F>([&](int k) {
    const int feature = k % (C * F), J0 = k / (C * F) * CHUNK_TILES;
    const float* samples = s + feature * STRIDE;
    const float* tiles = logits + feature / F * CLASS_STRIDE;
    const float inverse_ratio = 1.f / pass.ratio;  // sums are in units of a column's share
    float sum[CHUNK_TILES][T] = {};
#pragma unroll 1
    for (int I = pass.first_row; I < pass.last_row; ++I) {
      if (CHUNKS > 1 && SYMMETRIC && I >= J0 + CHUNK_TILES) break;
      const int row_tile = tiles_before<SYMMETRIC>(I) - (SYMMETRIC ? I : 0) - pass.first_tile;
      const float* tile = tiles + row_tile * TILE_STRIDE;
      float a[T], row[T] = {};
#pragma unroll
      for (int i = 0; i < T; ++i) a[i] = samples[I * T + i];
#pragma unroll
      for (int j = 0; j < CHUNK_TILES; ++j) {
        const int J = J0 + j;
        // the second condition, always true, keeps the compiler from loading many tiles ahead, which would spill
        if ((B % CHUNK_TILES == 0 || J < B) && (SYMMETRIC ? J >= I : row_tile + J < pass.tiles))
          add_slopes<SYMMETRIC>(a, samples + J * T, tile + J * TILE_STRIDE, pass.ratio, row, sum[j]);
      }
      if (CHUNKS > 1) {  // the rows' sums take the other chunks' columns too, those columns' sums are other threads'
        if (I < J0 || I >= J0 + CHUNK_TILES) continue;
        for (int J = SYMMETRIC ? J0 + CHUNK_TILES : 0; J < B; ++J) {
          float others[T] = {};
          if (J < J0 || J >= J0 + CHUNK_TILES)
            add_slopes<SYMMETRIC>(a, samples + J * T, tile + J * TILE_STRIDE, pass.ratio, row, others);
        }
      }
#pragma unroll
      for (int j = 0; j < CHUNK_TILES; ++j)
        if (J0 + j == I)
#pragma unroll
          for (int i = 0; i < T; ++i) sum[j][i] += SYMMETRIC ? row[i] : row[i] * inverse_ratio;
    }
    const float factor = scale * pass.to_t * pass.ratio;  // of columns: dt_ij/ds_j = to_t ratio
#pragma unroll
    for (int j = 0; j < CHUNK_TILES; ++j)
      if (B % CHUNK_TILES == 0 || J0 + j < B)
#pragma unroll
        for (int i = 0; i < T; ++i) ds[feature * STRIDE + (J0 + j) * T + i] = sum[j][i] * factor;
  });
}

__device__ __forceinline__ void sample_logits(const float* s, float to_logit, float* logits) {
  share_out<C * N>([&](int k) {
    const float* t = s + k / N * F * STRIDE + k % N;
    float sum = 0.f;
    for (int f = 0; f < F; ++f) {
      sum = add_power<DEGREE>(sum, 1.f, clamp(t[f * STRIDE]));
      if (UPPER) sum += DEGREE * fmaxf(t[f * STRIDE] - 1.f, 0.f);
    }
    logits[k] = sum * to_logit;
  });
}

__device__ __forceinline__ void sample_softmax(const Pass& pass, const int* target, float* logits, float& loss) {
  share_out<N>([&](int n) { loss += cross_entropy(logits + n, target[n], target[n], 1.f, pass.share); });
}

__device__ __forceinline__ void sample_gradient(const Pass& pass, const float* logits, float scale, float* s) {
  const float factor = scale * pass.to_t;
  share_out<C * F * N>([&](int k) {
    const int feature = k / N, n = k % N;
    float& at = s[feature * STRIDE + n];
    const float u = clamp(at), slope = DEGREE == 1 && LOWER ? u > 0.f : power<DEGREE - 1>(u);
    at = logits[feature / F * N + n] * slope * factor;
  });
}

// dL/dw of each group of patches, (PATCH_GROUPS, W)
__device__ __forceinline__ void weight_gradient(const float4* x, const float* ds, float* parts) {
  share_out<PATCH_GROUPS * FILTER_GROUPS * C * D4>([&](int k) {
    const int d = k % D4, c = k / D4 % C, m0 = k / (D4 * C) % FILTER_GROUPS * FILTER_GROUP;
    const int group = k / (D4 * C * FILTER_GROUPS);
    float4 sum[FILTER_GROUP] = {};
    for (int p = group * GROUP_PATCHES; p < (group + 1) * GROUP_PATCHES && p < P; ++p) {
      const float4* samples = x + p * ROWS * D4 + d;
      const float* slopes = ds + (c * F + p * M + m0) * STRIDE;
#pragma unroll 5
      for (int n = 0; n < N; ++n, samples += D4) {
        const float4 xs = __ldg(samples);
#pragma unroll
        for (int m = 0; m < FILTER_GROUP; ++m) {
          if (M % FILTER_GROUP && m0 + m >= M) break;
          const float e = slopes[m * STRIDE + n];
          sum[m].x += e * xs.x, sum[m].y += e * xs.y, sum[m].z += e * xs.z, sum[m].w += e * xs.w;
        }
      }
    }
#pragma unroll
    for (int m = 0; m < FILTER_GROUP; ++m) {
      if (M % FILTER_GROUP && m0 + m >= M) break;
      reinterpret_cast<float4*>(parts + group * W)[(c * M + m0 + m) * D4 + d] = sum[m];
    }
  });
}

extern __shared__ float4 shared_memory[];

extern "C" __global__ void __launch_bounds__(THREADS, 1) gradient_descent(
    const float4* __restrict__ input,         // (R or 1, P, ROWS, D4), zero where padded
    const long long* __restrict__ target,     // (R or 1, N)
    const float* __restrict__ weight_in,      // (R, C, M, PATCH_DIM)
    const float* __restrict__ momentum_in,    // likewise, unused without momentum
    float* __restrict__ weight_out,
    float* __restrict__ momentum_out,
    float* __restrict__ losses,               // (R, steps)
    const float* __restrict__ rates,          // lr, of any strides over runs and steps
    long long input_stride, long long target_stride, long long rate_run_stride, long long rate_step_stride,
    long long steps, float scale, float momentum, float weight_decay,
    const __grid_constant__ Passes passes) {
  float* shared = reinterpret_cast<float*>(shared_memory);
  float *logits = shared, *parts = shared, *w = shared + FILTERS_OFFSET, *velocity = shared + MOMENTUM_OFFSET;
  float *grad = shared + GRAD_OFFSET, *loss = shared + LOSS_OFFSET, *s = shared + S_OFFSET;
  float* ds = shared + DS_OFFSET;
  int *y = reinterpret_cast<int*>(shared + TARGET_OFFSET), *places = reinterpret_cast<int*>(shared + PLACES_OFFSET);

  const long long run = blockIdx.x, first_weight = run * (C * M * PATCH_DIM);
  const float4* x = input + run * input_stride;
  share_out<W>([&](int k) {
    const bool inside = k % D < PATCH_DIM;
    const long long at = first_weight + k / D * PATCH_DIM + k % D;
    w[k] = inside ? weight_in[at] : 0.f;
    if (MOMENTUM) velocity[k] = inside ? momentum_in[at] : 0.f;
  });
  share_out<ROWS>([&](int n) {
    const long long label = n < N ? target[run * target_stride + n] : 0;
    y[n] = label >= 0 && label < C ? int(label) : -1;
  });
  share_out<SYMMETRIC_PASSES ? B : 0>([&](int I) {
    for (int J = I; J < B; ++J) places[tiles_before<true>(I) + J - I] = I | J << 16;
  });
  __syncthreads();

  for (int step = 0; step < int(steps); ++step) {
    for (int k = 0; k < NUM_PASSES; ++k) {
      const Pass& pass = passes.all[k];
      const bool first_pass = k == 0, last_pass = k == NUM_PASSES - 1;

      if (first_pass) loss[thread_index()] = 0.f;
      convolve(x, w, pass.to_t, s, loss[thread_index()]);
      __syncthreads();
      if constexpr (ERM) {
        sample_logits(s, scale / DEGREE, logits);
        __syncthreads();
        sample_softmax(pass, y, logits, loss[thread_index()]);
        __syncthreads();
        sample_gradient(pass, logits, scale, s);
      } else if (k < SYMMETRIC_PASSES) {
        pair_logits<true>(pass, s, places, scale / DEGREE, logits);
        __syncthreads();
        pair_softmax<true>(pass, y, places, logits, loss[thread_index()]);
        __syncthreads();
        pair_gradient<true>(pass, logits, s, scale, ds);
      } else {
        pair_logits<false>(pass, s, places, scale / DEGREE, logits);
        __syncthreads();
        pair_softmax<false>(pass, y, places, logits, loss[thread_index()]);
        __syncthreads();
        pair_gradient<false>(pass, logits, s, scale, ds);
      }
      __syncthreads();
      weight_gradient(x, ds, parts);
      const int lane = thread_index() - (THREADS - 32);
      if (last_pass && lane >= 0) {  // the last warp often has nothing else to do here
        float total = 0.f;
        for (int t = lane; t < THREADS; t += 32) total += loss[t];
        loss[lane] = total;
      }
      __syncthreads();

      float total_loss = 0.f, rate = 0.f;
      if (last_pass) {
#pragma unroll
        for (int t = 0; t < 32; ++t) total_loss += loss[t];
        rate = rates[run * rate_run_stride + step * rate_step_stride] + 0.f * total_loss;  // NaN spreads to all weights
        if (thread_index() == 0) losses[run * steps + step] = total_loss;
      }
      share_out<W>([&](int at) {
        float total = first_pass ? 0.f : grad[at];
#pragma unroll 12
        for (int group = 0; group < PATCH_GROUPS; ++group) total += parts[group * W + at];
        if (last_pass) {
          total += weight_decay * w[at];
          if (MOMENTUM) velocity[at] = total += momentum * velocity[at];
          w[at] -= rate * total;
        } else {
          grad[at] = total;
        }
      });
      __syncthreads();
    }
  }
  share_out<W>([&](int k) {
    if (k % D >= PATCH_DIM) return;
    const long long at = first_weight + k / D * PATCH_DIM + k % D;
    weight_out[at] = w[k];
    if (MOMENTUM) momentum_out[at] = velocity[k];
  });
}
