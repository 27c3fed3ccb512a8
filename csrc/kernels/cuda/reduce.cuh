// Sums over a warp and scans of it, in a fixed order.
#pragma once

namespace sidestep {

constexpr int kWarp = 32;

// The sum over the warp, in its lane 0.
template <typename V>
__device__ __forceinline__ V warp_sum(V value) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) value += __shfl_down_sync(~0u, value, lane);
  return value;
}

// The sum over the lanes up to this one.
template <typename V>
__device__ __forceinline__ V warp_scan(V value) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const V before = __shfl_up_sync(~0u, value, lanes);
    if (lane >= lanes) value += before;
  }
  return value;
}

}  // namespace sidestep
