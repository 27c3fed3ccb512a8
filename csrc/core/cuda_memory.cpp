// Memory of a CUDA device: see memory.h. Plain C++ on CUDA's runtime; the kernels are elsewhere.
//
// Numbers go up through a ring of pinned buffers: a buffer is written again when the copy out of it
// is over, which it is unless the host runs far ahead of the device.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "core/memory.h"
#include "kernels/launch.h"

namespace sidestep {
namespace {

constexpr int kBuffers = 8;
constexpr int64_t kBufferBytes = int64_t{1} << 16;

Status checked(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return Status();
  cudaGetLastError();  // it is reported here, not by the process's next call
  return Status(SIDESTEP_FAILED,
                std::string("engine: CUDA cannot ") + what + ": " + cudaGetErrorString(error));
}

class CudaMemory : public Memory {
 public:
  ~CudaMemory() override {
    for (Buffer& buffer : ring_) {
      if (buffer.copied != nullptr) cudaEventDestroy(buffer.copied);
      if (buffer.bytes != nullptr) cudaFreeHost(buffer.bytes);
    }
    if (block_ != nullptr) cudaFree(block_);
  }

  Status prepare() {
    for (Buffer& buffer : ring_) {
      Status status = checked("allocate pinned memory",
                              cudaHostAlloc(&buffer.bytes, kBufferBytes, cudaHostAllocDefault));
      if (status.ok()) {
        status = checked("make an event",
                         cudaEventCreateWithFlags(&buffer.copied, cudaEventDisableTiming));
      }
      if (!status.ok()) return status;
    }
    return Status();
  }

  Status allocate(int64_t bytes, void** block) override {
    Status status = checked("allocate", cudaMalloc(&block_, static_cast<size_t>(bytes)));
    if (!status.ok()) return status;
    status = clear(block_, bytes);
    if (status.ok()) status = checked("clear memory", cudaStreamSynchronize(stream_));
    *block = block_;
    return status;
  }

  void release(void* block) override {
    if (block == nullptr || block != block_) return;
    cudaFree(block_);
    block_ = nullptr;
  }

  void use(void* stream) override { stream_ = static_cast<cudaStream_t>(stream); }

  Status clear(void* to, int64_t bytes) override {
    return checked("clear memory", cudaMemsetAsync(to, 0, static_cast<size_t>(bytes), stream_));
  }

  Status copy(void* to, const void* from, int64_t bytes) override {
    return move(to, from, bytes, cudaMemcpyDeviceToDevice);
  }

  Status upload(void* to, const void* host, int64_t bytes) override {
    for (int64_t done = 0; done < bytes; done += kBufferBytes) {
      const int64_t piece = std::min(bytes - done, kBufferBytes);
      Buffer& buffer = ring_[next_++ % kBuffers];
      Status status = checked("wait for a copy", cudaEventSynchronize(buffer.copied));
      if (!status.ok()) return status;
      std::memcpy(buffer.bytes, static_cast<const char*>(host) + done, static_cast<size_t>(piece));
      status = move(static_cast<char*>(to) + done, buffer.bytes, piece, cudaMemcpyHostToDevice);
      if (status.ok()) status = checked("mark a copy", cudaEventRecord(buffer.copied, stream_));
      if (!status.ok()) return status;
    }
    return Status();
  }

  Status download(void* host, const void* from, int64_t bytes) override {
    const Status status = move(host, from, bytes, cudaMemcpyDeviceToHost);
    return status.ok() ? checked("wait for a copy", cudaStreamSynchronize(stream_)) : status;
  }

  Status step(const sidestep_solver_step_args& args, void* workspace) override {
    return cuda_solver_step(args, workspace, stream_);
  }

 private:
  struct Buffer {
    void* bytes = nullptr;
    cudaEvent_t copied = nullptr;
  };

  Status move(void* to, const void* from, int64_t bytes, cudaMemcpyKind kind) {
    return checked("copy", cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), kind, stream_));
  }

  cudaStream_t stream_ = nullptr;
  Buffer ring_[kBuffers];
  unsigned next_ = 0;
  void* block_ = nullptr;
};

}  // namespace

Status cuda_memory(std::unique_ptr<Memory>* memory) {
  auto made = std::make_unique<CudaMemory>();
  const Status status = made->prepare();
  if (status.ok()) *memory = std::move(made);
  return status;
}

}  // namespace sidestep
