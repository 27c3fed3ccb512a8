// Sums over a warp, in a fixed order.
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

}  // namespace sidestep
