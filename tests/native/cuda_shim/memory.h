// Memory and copies: device memory is the heap, so that AddressSanitizer guards it too.
#pragma once

#include <cstdlib>
#include <cstring>

#include "streams.h"

enum cudaMemcpyKind {
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
};
constexpr unsigned cudaHostAllocDefault = 0;

inline cudaError_t cudaMalloc(void** block, size_t bytes) {
  *block = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *block != nullptr ? cudaSuccess : cuda_shim::failed(cudaErrorInvalidValue);
}
inline cudaError_t cudaFree(void* block) {
  std::free(block);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** block, size_t bytes, unsigned) {
  return cudaMalloc(block, bytes);
}
inline cudaError_t cudaFreeHost(void* block) { return cudaFree(block); }

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
  return cuda_shim::enqueue(stream, [=] { std::memcpy(to, from, bytes); });
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return cuda_shim::enqueue(stream, [=] { std::memset(to, value, bytes); });
}
