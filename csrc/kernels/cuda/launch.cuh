// What the GPU's launchers share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "core/status.h"

namespace sidestep {

inline Status cuda_status(const char* operation, cudaError_t error) {
  if (error == cudaSuccess) return Status();
  return Status(SIDESTEP_FAILED,
                std::string(operation) + ": CUDA refused the launch: " + cudaGetErrorString(error));
}

// 16-byte accesses need every row of every array to begin at a multiple of 16 bytes.
inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

inline Status check_workspace(const char* operation, const void* workspace) {
  if (workspace != nullptr && aligned(workspace)) return Status();
  return invalid_argument("%s: workspace is %p, expected an address divisible by 16", operation,
                          workspace);
}

}  // namespace sidestep
