// The fused step on the GPU: one block per chunk of a row, the arithmetic of kernels/solver_step.h.
//
// Every thread owns fixed elements of its chunk, whatever the alignment, and sums are added in a
// fixed order (thread, warp, block, then chunks in order by the block that finishes last), so the
// bits of a row depend on nothing but the row. Nothing is allocated and nothing waits: a CUDA graph
// may capture it.
#include <cuda_runtime.h>

#include <cmath>

#include "core/table.h"
#include "kernels/cuda/dtype.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/launch.h"
#include "kernels/solver_step.h"

namespace sidestep {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// The caller's workspace. Each launch leaves the counter at 0.
struct Workspace {
  unsigned int* finished;  // [1] blocks that have left their sums
  float2* sums;            // [rows, chunks]: sum |x' - x|, sum |E . columns|
};

// Stores one thread's elements of a pack, and gathers their stats.
template <typename T, int P>
struct PackSink {
  const sidestep_solver_step_args& args;
  float* registers;  // registers[slot, 0, at]
  int64_t offset;    // row * D + at
  bool whole;        // all P elements exist and 16-byte accesses may be used
  int n;             // elements that exist
  float2 sums;

  __device__ __forceinline__ void change(int p, float difference) {
    if (p < n) sums.x += fabsf(difference);
  }
  __device__ __forceinline__ void error(int p, float estimate) {
    if (p < n) sums.y += fabsf(estimate);
  }
  __device__ __forceinline__ void write(int line, const float (&sum)[P]) {
    Pack<float, P> pack;
#pragma unroll
    for (int p = 0; p < P; ++p) pack.element[p] = sum[p];
    write_pack(pack, registers + line * args.dim, whole, n);
  }
  __device__ __forceinline__ void input(const float (&scaled)[P]) {
    if (args.model_input == nullptr) return;
    Pack<T, P> pack;
#pragma unroll
    for (int p = 0; p < P; ++p) pack.element[p] = from_float<T>(scaled[p]);
    for (int g = 0; g < args.num_branches; ++g) {
      T* to = static_cast<T*>(args.model_input) + g * args.rows * args.dim + offset;
      write_pack(pack, to, whole, n);
    }
  }
};

template <typename T, int R, int P>
__device__ __forceinline__ void read_columns(const sidestep_solver_step_args& args, uint32_t read,
                                             const float* weights,    // [G] of this row
                                             const float* registers,  // registers[slot, 0, at]
                                             int64_t offset, bool whole, int n,
                                             float (&column)[R + 2][P]) {
#pragma unroll
  for (int j = 0; j < R + 2; ++j) {
    if ((read >> j & 1u) == 0 || j == R) {
#pragma unroll
      for (int p = 0; p < P; ++p) column[j][p] = 0.0f;
      continue;
    }
    const float* from = j < R ? registers + j * args.dim : args.noise + offset;
    const auto pack = read_pack<float, P>(from, whole, n);
#pragma unroll
    for (int p = 0; p < P; ++p) column[j][p] = pack.element[p];
  }
  if ((read >> R & 1u) == 0) return;
  bool any = false;
  for (int g = 0; g < args.num_branches; ++g) any = any || weights[g] != 0.0f;
#pragma unroll
  for (int p = 0; p < P; ++p) column[R][p] = sum_start(any);
#pragma unroll
  for (int g = 0; g < kMaxBranches; ++g) {
    if (g >= args.num_branches || weights[g] == 0.0f) continue;
    const T* from = static_cast<const T*>(args.outputs[g]) + offset;
    const auto pack = read_pack<T, P>(from, whole, n);
    float output[P];
#pragma unroll
    for (int p = 0; p < P; ++p) output[p] = to_float(pack.element[p]);
    add_branch(weights[g], output, column[R]);
  }
}

// The chunk [begin, begin + kCudaChunk) of one row; returns this thread's share of the sums.
template <typename T, int R>
__device__ __forceinline__ float2 step_chunk(const sidestep_solver_step_args& args,
                                             const StepProgram& program, int64_t row, int64_t slot,
                                             int64_t begin, bool vectors) {
  constexpr int P = 16 / sizeof(T);
  const uint32_t read = columns_read(program, R);
  const float* weights = args.weights + row * args.num_branches;
  float2 sums = make_float2(0.0f, 0.0f);
  for (int local = threadIdx.x * P; local < kCudaChunk; local += kThreads * P) {
    const int64_t at = begin + local;
    const int64_t left = args.dim - at;
    if (left <= 0) break;
    const int n = left < P ? static_cast<int>(left) : P;
    const bool whole = vectors && n == P;
    float* registers = args.registers + slot * R * args.dim + at;
    const int64_t offset = row * args.dim + at;
    float column[R + 2][P];
    read_columns<T, R, P>(args, read, weights, registers, offset, whole, n, column);
    PackSink<T, P> sink{args, registers, offset, whole, n, sums};
    step_columns<R, float, P>(program, column, sink);
    sums = sink.sums;
  }
  return sums;
}

// The sum over the block, in thread 0.
__device__ __forceinline__ float2 block_sum(float2 value) {
  __shared__ float2 of_warp[kWarps];
  value.x = warp_sum(value.x);
  value.y = warp_sum(value.y);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) {
      value.x += of_warp[w].x;
      value.y += of_warp[w].y;
    }
  }
  return value;
}

// stats[row] from the chunks' sums; one warp per row, chunks in a fixed order.
__device__ void write_stats(const sidestep_solver_step_args& args, const float2* sums,
                            int64_t chunks) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = threadIdx.x / kWarp; row < args.rows; row += kWarps) {
    double change = 0.0;
    double error = 0.0;
    for (int64_t chunk = lane; chunk < chunks; chunk += kWarp) {
      const float2 sum = __ldcg(sums + row * chunks + chunk);
      change += static_cast<double>(sum.x);
      error += static_cast<double>(sum.y);
    }
    change = warp_sum(change);
    error = warp_sum(error);
    if (lane == 0) {
      args.stats[row * 2] = static_cast<float>(change / static_cast<double>(args.dim));
      args.stats[row * 2 + 1] = static_cast<float>(error / static_cast<double>(args.dim));
    }
  }
}

template <typename T, int R>
__global__ void __launch_bounds__(kThreads, 2)
    solver_step_kernel(const sidestep_solver_step_args args, const Workspace workspace,
                       const unsigned int chunks, const bool vectors) {
  __shared__ StepProgram program;
  __shared__ bool is_last;
  const int64_t row = blockIdx.x / chunks;
  const int64_t begin = blockIdx.x % chunks * kCudaChunk;
  const int64_t k = args.step[row];
  const int64_t slot = args.slot != nullptr ? args.slot[row] : row;
  float2 sums = make_float2(NAN, NAN);
  if (k >= 0 && k < args.steps && slot >= 0 && slot < args.slots) {
    const float* line = args.table + k * table_width(R);
    if (threadIdx.x <= R) read_line(line, R, args.noise != nullptr, threadIdx.x, &program);
    if (threadIdx.x == 0) program.next_scale = read_next_scale(line, R);
    __syncthreads();
    sums = step_chunk<T, R>(args, program, row, slot, begin, vectors);
  }
  sums = block_sum(sums);
  if (threadIdx.x == 0) {
    workspace.sums[blockIdx.x] = sums;
    __threadfence();
    // Wraps to 0 at the last block: ready for the next launch.
    is_last = atomicInc(workspace.finished, gridDim.x - 1) == gridDim.x - 1;
    if (is_last) __threadfence();  // by who has read the counter, before the barrier hands it on
  }
  __syncthreads();
  if (is_last) write_stats(args, workspace.sums, chunks);
}

using Kernel = void (*)(sidestep_solver_step_args, Workspace, unsigned int, bool);

template <typename T>
Kernel kernel_for(int num_registers) {
  constexpr Kernel kKernels[] = {solver_step_kernel<T, 1>, solver_step_kernel<T, 2>,
                                 solver_step_kernel<T, 3>, solver_step_kernel<T, 4>,
                                 solver_step_kernel<T, 5>, solver_step_kernel<T, 6>};
  return kKernels[num_registers - 1];
}

Kernel kernel_for(const sidestep_solver_step_args& args) {
  switch (args.dtype) {
    case SIDESTEP_FLOAT32:
      return kernel_for<float>(args.num_registers);
    case SIDESTEP_FLOAT16:
      return kernel_for<__half>(args.num_registers);
    default:
      return kernel_for<__nv_bfloat16>(args.num_registers);
  }
}

bool can_use_vectors(const sidestep_solver_step_args& args) {
  const int64_t pack = args.dtype == SIDESTEP_FLOAT32 ? 4 : 8;
  bool vectors = args.dim % pack == 0 && aligned(args.registers) && aligned(args.noise) &&
                 aligned(args.model_input);
  for (int g = 0; g < args.num_branches; ++g) vectors = vectors && aligned(args.outputs[g]);
  return vectors;
}

}  // namespace

Status cuda_solver_step(const sidestep_solver_step_args& args, void* workspace,
                        void* stream_handle) {
  const Status sizes = check_solver_step(args);
  if (!sizes.ok()) return sizes;
  if (args.rows == 0) return Status();
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (args.dim == 0) {
    const size_t bytes = args.rows * 2 * sizeof(float);
    return cuda_status("solver_step", cudaMemsetAsync(args.stats, 0, bytes, stream));
  }
  const Status scratch = check_workspace("solver_step", workspace);
  if (!scratch.ok()) return scratch;
  const int64_t row_chunks = cuda_chunks(args.dim);
  const int64_t blocks = args.rows * row_chunks;
  if (blocks > INT32_MAX) {
    return invalid_argument("solver_step: rows * D needs %lld blocks, expected at most %d",
                            static_cast<long long>(blocks), INT32_MAX);
  }
  auto* base = static_cast<char*>(workspace);
  const Workspace split{reinterpret_cast<unsigned int*>(base),
                        reinterpret_cast<float2*>(base + kCudaWorkspaceHeader)};
  return launch("solver_step", kernel_for(args), blocks, kThreads, stream, args, split,
                static_cast<unsigned int>(row_chunks), can_use_vectors(args));
}

}  // namespace sidestep
