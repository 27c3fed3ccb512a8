// Where the arrays of an engine are, and what moves and steps them: host memory, or a CUDA device.
#pragma once

#include <cstdint>
#include <memory>

#include "core/status.h"
#include "sidestep/sidestep.h"

namespace sidestep {

// What a call does is ordered on the stream that use() was given last. Nothing waits, but for
// download and allocate.
class Memory {
 public:
  virtual ~Memory() = default;

  virtual Status allocate(int64_t bytes, void** block) = 0;  // zeros, divisible by kAlignment
  virtual void release(void* block) = 0;
  virtual void use(void* stream) = 0;
  virtual Status clear(void* to, int64_t bytes) = 0;
  virtual Status copy(void* to, const void* from, int64_t bytes) = 0;
  virtual Status upload(void* to, const void* host, int64_t bytes) = 0;  // host is free at once
  virtual Status download(void* host, const void* from, int64_t bytes) = 0;
  virtual Status step(const sidestep_solver_step_args& args, void* workspace) = 0;
};

constexpr int64_t kAlignment = 256;

std::unique_ptr<Memory> host_memory();

// SIDESTEP_UNAVAILABLE in a build without CUDA.
Status cuda_memory(std::unique_ptr<Memory>* memory);

}  // namespace sidestep
