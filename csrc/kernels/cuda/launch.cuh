// What the GPU's launchers share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "core/status.h"

namespace sidestep {

inline Status cuda_status(const char* operation, cudaError_t error) {
  if (error == cudaSuccess) return Status();
  cudaGetLastError();  // it is reported here, not by the process's next call
  return Status(SIDESTEP_FAILED,
                std::string(operation) + ": CUDA refused the launch: " + cudaGetErrorString(error));
}

// Launches a kernel on a stream. (Plain C++, without <<<>>>: the tests run these files on the CPU.)
template <typename... Parameters>
Status launch(const char* operation, void (*kernel)(Parameters...), int64_t blocks, int threads,
              cudaStream_t stream, std::decay_t<Parameters>... arguments) {
  void* parameters[] = {&arguments...};
  const dim3 grid(static_cast<unsigned int>(blocks));
  const dim3 block(static_cast<unsigned int>(threads));
  return cuda_status(operation, cudaLaunchKernel(kernel, grid, block, parameters, 0, stream));
}

// 16-byte accesses need every row of every array to begin at a multiple of 16 bytes.
inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

inline Status check_workspace(const char* operation, const void* workspace) {
  if (workspace != nullptr && aligned(workspace)) return Status();
  return invalid_argument("%s: workspace is %p, expected an address divisible by 16", operation,
                          workspace);
}

}  // namespace sidestep
