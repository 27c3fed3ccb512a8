// Vectors of memory and the model's dtypes on the GPU: 16 bytes a load, whatever the dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sidestep {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// N consecutive elements in as few 16-byte pieces as they fill; moved whole when `whole`, else only
// the first `n` of them one by one (the rest read as 0).
template <typename T, int N>
struct alignas(16) Pack {
  T element[N];
};

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> read_pack(const T* from, bool whole, int n) {
  static_assert(N * sizeof(T) % 16 == 0, "a pack fills 16-byte pieces");
  constexpr int kPieces = N * sizeof(T) / 16;
  Pack<T, N> pack;
  if (whole) {
    uint4 piece[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) piece[i] = reinterpret_cast<const uint4*>(from)[i];
    memcpy(&pack, piece, sizeof(pack));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) pack.element[i] = i < n ? from[i] : from_float<T>(0.0f);
  }
  return pack;
}

template <typename T, int N>
__device__ __forceinline__ void write_pack(const Pack<T, N>& pack, T* to, bool whole, int n) {
  constexpr int kPieces = N * sizeof(T) / 16;
  if (whole) {
    uint4 piece[kPieces];
    memcpy(piece, &pack, sizeof(pack));
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      // A plain assignment is split into words and merged with the other branch's stores.
      __stwb(reinterpret_cast<uint4*>(to) + i, piece[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < n) to[i] = pack.element[i];
    }
  }
}

}  // namespace sidestep
