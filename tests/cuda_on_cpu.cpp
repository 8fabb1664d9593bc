// Runs a CUDA kernel on a CPU: each thread of a block is a fiber, and __syncthreads() lets the others catch up.
//
// Between two barriers one thread runs after the other, in an order that `seed` draws anew each time: a kernel without
// races gives the same bits for every seed. Shared memory begins as NaN, and what lies behind it is watched. What
// differs from a GPU: exp and log are the C library's.
//
// Macros: KERNEL_FILE and KERNEL, and all that the kernel itself asks for; SHARED_FLOATS is the size of shared_memory.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)

struct float4 {
  float x, y, z, w;
};
struct Index {
  int x;
};
static Index blockIdx;
static int thread;  // that runs

template <class Value>
Value __ldg(const Value* address) {
  return *address;
}
inline int thread_index() { return thread; }
inline float saturated(float t) { return t > 0.f ? (t < 1.f ? t : 1.f) : 0.f; }  // of NaN 0, as on a GPU
inline float add_sat(float a, float b) { return saturated(a + b); }
inline float fma_sat(float a, float b, float c) { return saturated(fmaf(a, b, c)); }

static ucontext_t scheduler;
static std::vector<ucontext_t> fibers;
static std::vector<char> finished;
static void** arguments;

inline void __syncthreads() { swapcontext(&fibers[thread], &scheduler); }

#include KERNEL_FILE

constexpr int kGuard = 256;
float4 shared_memory[SHARED_FLOATS / 4 + 1 + kGuard];

template <class... Parameters, std::size_t... Places>
static void call(void (*kernel)(Parameters...), std::index_sequence<Places...>) {
  kernel(*static_cast<std::remove_const_t<Parameters>*>(arguments[Places])...);
}
template <class... Parameters>
static void call(void (*kernel)(Parameters...)) {
  call(kernel, std::index_sequence_for<Parameters...>());
}

static void fiber() {
  call(KERNEL);
  finished[thread] = 1;
}

// Returns 0; 1 if threads of a block end while others wait at a barrier; 2 if it wrote beyond shared memory.
extern "C" int run(void** addresses, int blocks, int threads, unsigned seed) {
  constexpr std::size_t kStack = 64 << 10;
  const std::unique_ptr<char[]> stacks(new char[threads * kStack]);
  std::mt19937 random(seed);
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  arguments = addresses;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    std::memset(shared_memory, 0xff, sizeof(shared_memory));
    fibers.assign(threads, {});
    finished.assign(threads, 0);
    for (int t = 0; t < threads; ++t) {
      getcontext(&fibers[t]);
      fibers[t].uc_stack.ss_sp = &stacks[t * kStack];
      fibers[t].uc_stack.ss_size = kStack;
      fibers[t].uc_link = &scheduler;
      makecontext(&fibers[t], fiber, 0);
    }
    for (int ended = 0; ended < threads;) {
      std::shuffle(order.begin(), order.end(), random);
      for (const int t : order) {
        thread = t;
        swapcontext(&scheduler, &fibers[t]);
      }
      ended = std::accumulate(finished.begin(), finished.end(), 0);
      if (ended && ended < threads) return 1;
    }
    const auto *all = reinterpret_cast<const unsigned char*>(shared_memory), *end = all + sizeof(shared_memory);
    if (std::any_of(all + SHARED_FLOATS * 4, end, [](unsigned char byte) { return byte != 0xff; })) return 2;
  }
  return 0;
}
