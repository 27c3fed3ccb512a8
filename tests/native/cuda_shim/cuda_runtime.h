// As much of CUDA's runtime as the kernels use, for g++: a test-only stand-in for the toolkit's
// header of this name. A launch is over when it returns, or recorded while its stream captures.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

#include "fibres.h"
#include "memory.h"
#include "streams.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

// Blocks that run at once, for ThreadSanitizer, have a thread each. Else they run one after
// another, and AddressSanitizer guards the ends of shared memory, which it does not for
// thread_local.
#if defined(__SANITIZE_THREAD__)
#define __shared__ static thread_local
#else
#define __shared__ static
#endif

#define threadIdx (cuda_shim::place().thread)
#define blockIdx (cuda_shim::place().block)
#define blockDim (cuda_shim::place().threads)
#define gridDim (cuda_shim::place().blocks)

struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

// ---- inside a kernel ----

inline void __syncthreads() { cuda_shim::sync_block(); }
inline void __threadfence() { cuda_shim::fence(); }

template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
void __stwb(T* to, T value) {
  *to = value;
}

namespace cuda_shim {

template <typename V>
V shuffled(unsigned int mask, V value, int source) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8, "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  bits = shuffle(mask, bits, source);
  std::memcpy(&value, &bits, sizeof(V));
  return value;
}

// Replaces *address by next(*address), at once, and returns what was there.
template <typename T, typename Next>
T atomically(T* address, Next next) {
  before_atomic(address);
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, next(old), true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  after_atomic(address);
  return old;
}

}  // namespace cuda_shim

template <typename V>
V __shfl_down_sync(unsigned int mask, V value, unsigned int delta) {
  const int lane = cuda_shim::lane();
  const int source = lane + static_cast<int>(delta);
  return cuda_shim::shuffled(mask, value, source < 32 ? source : lane);
}
template <typename V>
V __shfl_up_sync(unsigned int mask, V value, unsigned int delta) {
  const int lane = cuda_shim::lane();
  const int source = lane - static_cast<int>(delta);
  return cuda_shim::shuffled(mask, value, source >= 0 ? source : lane);
}
template <typename V>
V __shfl_xor_sync(unsigned int mask, V value, int bits) {
  return cuda_shim::shuffled(mask, value, cuda_shim::lane() ^ bits);
}

inline unsigned int atomicInc(unsigned int* address, unsigned int last) {
  return cuda_shim::atomically(address, [=](unsigned int v) { return v >= last ? 0 : v + 1; });
}
inline unsigned int atomicAdd(unsigned int* address, unsigned int value) {
  return cuda_shim::atomically(address, [=](unsigned int v) { return v + value; });
}

// ---- outside ----

namespace cuda_shim {

// A kernel with the values its parameters have now.
template <typename... Parameters, size_t... I>
std::function<void()> bound(void (*kernel)(Parameters...), void** arguments,
                            std::index_sequence<I...>) {
  const std::tuple<Parameters...> values(*static_cast<Parameters*>(arguments[I])...);
  return [=] { std::apply(kernel, values); };
}

}  // namespace cuda_shim

template <typename... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes = 0, cudaStream_t stream = nullptr) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || uint64_t{grid.x} * grid.y * grid.z == 0 ||
      grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 || shared_bytes > 0) {
    return cuda_shim::failed(cudaErrorInvalidConfiguration);
  }
  const cuda_shim::Index3 blocks{grid.x, grid.y, grid.z};
  const cuda_shim::Index3 width{block.x, block.y, block.z};
  const auto thread = cuda_shim::bound(kernel, arguments, std::index_sequence_for<Parameters...>());
  return cuda_shim::enqueue(stream, [=] { cuda_shim::run_grid(blocks, width, thread); });
}
