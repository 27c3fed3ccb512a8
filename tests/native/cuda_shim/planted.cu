// Kernels that are wrong when `Planted`, and right otherwise: what the shim and the sanitizers must
// find. planted NAME prints the result of the right kernel, planted NAME wrong runs the other.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/reduce.cuh"

namespace {

using sidestep::launch;
using sidestep::Status;

constexpr int kThreads = 64;

// x reversed. Wrong: a thread reads what another writes, without a barrier between.
template <bool Planted>
__global__ void reverse_kernel(float* x) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = x[threadIdx.x];
  if (!Planted) __syncthreads();
  x[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// Threads of the grid. Wrong: the blocks add without an atomic.
template <bool Planted>
__global__ void count_kernel(unsigned int* count) {
  __shared__ unsigned int of_block;
  if (threadIdx.x == 0) of_block = 0;
  __syncthreads();
  atomicAdd(&of_block, 1);
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (Planted) {
    *count += of_block;
  } else {
    atomicAdd(count, of_block);
  }
}

// The sum over the blocks of their number, by the block that ends last. Wrong: no fence between the
// block's sum and the count that tells the others of it.
template <bool Planted>
__global__ void last_block_kernel(float* sums,             // [blocks]
                                  unsigned int* finished,  // [1]
                                  float* total) {
  if (threadIdx.x != 0) return;
  sums[blockIdx.x] = static_cast<float>(blockIdx.x);
  if (!Planted) __threadfence();
  if (atomicInc(finished, gridDim.x - 1) != gridDim.x - 1) return;
  __threadfence();
  *total = 0.0f;
  for (unsigned int b = 0; b < gridDim.x; ++b) *total += sums[b];
}

// Ones. Wrong: one too many.
template <bool Planted>
__global__ void ones_kernel(float* x, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n || (Planted && i == n)) x[i] = 1.0f;
}

// x rotated by one place. Wrong: the last thread writes behind the end of shared memory.
template <bool Planted>
__global__ void rotate_kernel(float* x) {
  __shared__ float tile[kThreads];
  float* to = tile;
  const unsigned int place = threadIdx.x + 1;
  to[Planted ? place : place % kThreads] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = tile[threadIdx.x];
}

// The sum over every warp, in all its lanes. Wrong: one lane has gone to a barrier instead.
template <bool Planted>
__global__ void sum_kernel(float* x) {
  if (Planted && threadIdx.x == 3) __syncthreads();
  float sum = x[threadIdx.x];
  for (int bits = sidestep::kWarp / 2; bits > 0; bits /= 2) {
    sum += __shfl_xor_sync(~0u, sum, bits);
  }
  x[threadIdx.x] = sum;
}

// The threads of the grid twice, by a graph. Wrong: waits for the stream that captures.
template <bool Planted>
Status capture(unsigned int* count) {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  Status status = launch("capture", count_kernel<false>, 5, kThreads, stream, count);
  if (Planted) cudaStreamSynchronize(stream);
  const cudaError_t error = cudaStreamEndCapture(stream, &graph);
  if (error == cudaSuccess) {
    cudaGraphInstantiateWithFlags(&executable, graph, 0);
    for (int i = 0; i < 2; ++i) cudaGraphLaunch(executable, stream);
    cudaStreamSynchronize(stream);
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
  } else {
    status = sidestep::cuda_status("capture", error);
  }
  cudaStreamDestroy(stream);
  return status;
}

template <bool Planted>
Status run(const char* name, float* x, unsigned int* count) {
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("reverse")) return launch(name, reverse_kernel<Planted>, 1, kThreads, nullptr, x);
  if (is("rotate")) return launch(name, rotate_kernel<Planted>, 1, kThreads, nullptr, x);
  if (is("sum")) return launch(name, sum_kernel<Planted>, 1, kThreads, nullptr, x);
  if (is("count")) return launch(name, count_kernel<Planted>, 5, kThreads, nullptr, count);
  if (is("ones")) return launch(name, ones_kernel<Planted>, 2, kThreads, nullptr, x, kThreads);
  if (is("last-block")) {
    return launch(name, last_block_kernel<Planted>, 5, kThreads, nullptr, x + 1, count, x);
  }
  if (is("capture")) return capture<Planted>(count);
  if (is("block")) return launch(name, count_kernel<Planted>, 1, 2048, nullptr, count);
  return Status(SIDESTEP_INVALID_ARGUMENT, "no such kernel");
}

}  // namespace

int main(int argc, char** argv) {
  auto* x = static_cast<float*>(std::malloc(kThreads * sizeof(float)));
  auto* count = static_cast<unsigned int*>(std::calloc(1, sizeof(unsigned int)));
  for (int i = 0; i < kThreads; ++i) x[i] = static_cast<float>(i);
  const char* name = argc > 1 ? argv[1] : "";
  const Status status = argc > 2 ? run<true>(name, x, count) : run<false>(name, x, count);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.message().c_str());
  for (int i = 0; i < kThreads; ++i) std::printf("%g ", static_cast<double>(x[i]));
  std::printf("%u\n", *count);
  std::free(x);
  std::free(count);
  if (cudaGetLastError() != cudaSuccess) return 3;
  return status.ok() ? 0 : 2;
}
