// The parareal operators on the GPU: one block per chunk of a row, the arithmetic of
// kernels/parareal.h.
//
// Every thread owns fixed elements of its chunk, whatever the alignment, and sums are added in a
// fixed order (thread, warp, block, and in a second, tiny kernel the chunks of a row), so the bits
// of a row depend on nothing but the row. Nothing is allocated and nothing waits: a CUDA graph may
// capture it.
#include <cuda_runtime.h>

#include "kernels/cuda/dtype.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/launch.h"
#include "kernels/parareal.h"

namespace sidestep {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int P = 4;  // consecutive elements of a thread: one 16-byte access
using Floats = Pack<float, P>;

// One thread's elements of a chunk.
struct Place {
  int64_t at;  // of the row
  int n;       // elements that exist
  bool whole;  // all P of them, and 16-byte accesses may be used
};

__device__ __forceinline__ bool find_place(int64_t dim, int64_t begin, int local, bool vectors,
                                           Place* place) {
  place->at = begin + local;
  const int64_t left = dim - place->at;
  place->n = left < P ? static_cast<int>(left) : P;
  place->whole = vectors && left >= P;
  return left > 0;
}

// The columns that are read; the others count as equal. All loads come before their first use.
template <int C>
__device__ __forceinline__ void read_differences(const float* now,     // [C, D] of the row
                                                 const float* before,  // [C, D]
                                                 int64_t dim, uint32_t read, const Place& place,
                                                 float (&d)[C][P]) {
  Floats a[C];
  Floats b[C];
#pragma unroll
  for (int j = 0; j < C; ++j) {
    if ((read >> j & 1u) != 0) {
      a[j] = read_pack<float, P>(now + j * dim + place.at, place.whole, place.n);
      b[j] = read_pack<float, P>(before + j * dim + place.at, place.whole, place.n);
    } else {
      a[j] = b[j] = Floats{};
    }
  }
#pragma unroll
  for (int j = 0; j < C; ++j) {
#pragma unroll
    for (int p = 0; p < P; ++p) d[j][p] = difference(a[j].element[p], b[j].element[p]);
  }
}

// Leaves the block's sums in `to`.
template <int K>
__device__ __forceinline__ void write_block_sums(float (&sum)[K], float* to) {
  __shared__ float of_warp[kWarps][K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const float total = warp_sum(sum[k]);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp][k] = total;
  }
  __syncthreads();
  if (threadIdx.x >= K) return;
  float total = of_warp[0][threadIdx.x];
  for (int w = 1; w < kWarps; ++w) total += of_warp[w][threadIdx.x];
  to[threadIdx.x] = total;
}

template <int C>
__global__ void __launch_bounds__(kThreads, 2)
    difference_gram_kernel(const sidestep_difference_gram_args args, float* sums,
                           const unsigned int chunks, const bool vectors) {
  constexpr int kPairs = gram_pairs(C);
  const int64_t row = blockIdx.x / chunks;
  const int64_t begin = blockIdx.x % chunks * kCudaChunk;
  const float* now = args.new_vectors + row * C * args.dim;
  const float* before = args.old_vectors + row * C * args.dim;
  float sum[kPairs] = {};
  for (int local = threadIdx.x * P; local < kCudaChunk; local += kThreads * P) {
    Place place;
    if (!find_place(args.dim, begin, local, vectors, &place)) break;
    float d[C][P];
    read_differences<C>(now, before, args.dim, ~0u, place, d);
    int pair = 0;
#pragma unroll
    for (int i = 0; i < C; ++i) {
#pragma unroll
      for (int j = i; j < C; ++j, ++pair) {
#pragma unroll
        for (int p = 0; p < P; ++p) sum[pair] += d[i][p] * d[j][p];  // absent elements are 0
      }
    }
  }
  write_block_sums(sum, sums + int64_t{blockIdx.x} * kPairs);
}

template <int R>
__global__ void __launch_bounds__(kThreads, 2)
    parareal_correct_kernel(const sidestep_parareal_correct_args args, float* sums,
                            const unsigned int chunks, const bool vectors) {
  __shared__ float coefficients[R * (R + 1)];
  const int64_t row = blockIdx.x / chunks;
  const int64_t begin = blockIdx.x % chunks * kCudaChunk;
  const float* now = args.new_vectors + row * (R + 1) * args.dim;
  const float* before = args.old_vectors + row * (R + 1) * args.dim;
  if (threadIdx.x < R * (R + 1)) {
    coefficients[threadIdx.x] = args.coefficients[row * R * (R + 1) + threadIdx.x];
  }
  __syncthreads();
  const uint32_t read = columns_corrected(coefficients, R);
  float sum[2] = {};  // (x' - x)^2 and x'^2
  for (int local = threadIdx.x * P; local < kCudaChunk; local += kThreads * P) {
    Place place;
    if (!find_place(args.dim, begin, local, vectors, &place)) break;
    float d[R + 1][P];
    read_differences<R + 1>(now, before, args.dim, read, place, d);
    Floats fine[R];  // read after the differences, which by now take half as many registers
    const int64_t states = row * R * args.dim + place.at;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      fine[r] = read_pack<float, P>(args.fine + states + r * args.dim, place.whole, place.n);
    }
    const Floats x = read_pack<float, P>(args.boundary + states, place.whole, place.n);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      Floats corrected;
      correct<R + 1, float, P>(coefficients + r * (R + 1), d, fine[r].element, corrected.element);
      write_pack(corrected, args.boundary + states + r * args.dim, place.whole, place.n);
      if (r > 0) continue;
#pragma unroll
      for (int p = 0; p < P; ++p) {
        if (p >= place.n) continue;
        const float moved = corrected.element[p] - x.element[p];
        sum[0] += moved * moved;
        sum[1] += corrected.element[p] * corrected.element[p];
      }
    }
  }
  write_block_sums(sum, sums + int64_t{blockIdx.x} * 2);
}

// Sum k of one row over its chunks, in lane 0 of the warp.
__device__ __forceinline__ double row_sum(const float* sums,  // [rows, chunks, count]
                                          unsigned int chunks, int count, int k) {
  const float* from = sums + int64_t{blockIdx.x} * chunks * count + k;
  double total = 0.0;
  for (unsigned int chunk = threadIdx.x % kWarp; chunk < chunks; chunk += kWarp) {
    total += static_cast<double>(from[int64_t{chunk} * count]);
  }
  return warp_sum(total);
}

// gram from the chunks' sums: a block per row, a warp per pair.
__global__ void __launch_bounds__(kThreads)
    finish_gram_kernel(const float* sums,  // [rows, chunks, V * (V + 1) / 2]
                       float* gram,        // [rows, V, V]
                       const unsigned int chunks, const int num_vectors) {
  const int count = num_vectors * (num_vectors + 1) / 2;
  float* to = gram + int64_t{blockIdx.x} * num_vectors * num_vectors;
  for (int k = threadIdx.x / kWarp; k < count; k += kWarps) {
    const auto total = static_cast<float>(row_sum(sums, chunks, count, k));
    int i = 0;
    int j = k;
    for (; j >= num_vectors - i; ++i) j -= num_vectors - i;
    j += i;
    if (threadIdx.x % kWarp == 0) to[i * num_vectors + j] = to[j * num_vectors + i] = total;
  }
}

// residual from the chunks' sums: a block per row, a warp per mean.
__global__ void __launch_bounds__(2 * kWarp)
    finish_residual_kernel(const float* sums,  // [rows, chunks, 2]
                           float* residual,    // [rows, 2]
                           const unsigned int chunks, const int64_t dim) {
  const int k = threadIdx.x / kWarp;
  const double total = row_sum(sums, chunks, 2, k);
  if (threadIdx.x % kWarp != 0) return;
  residual[int64_t{blockIdx.x} * 2 + k] = static_cast<float>(total / static_cast<double>(dim));
}

// The chunks of a row, or why they cannot be launched.
Status count_chunks(const char* operation, int64_t rows, int64_t dim, const void* workspace,
                    unsigned int* chunks) {
  const Status scratch = check_workspace(operation, workspace);
  if (!scratch.ok()) return scratch;
  const int64_t row_chunks = cuda_chunks(dim);
  if (row_chunks > INT32_MAX / rows) {
    return invalid_argument("%s: rows * D is %lld * %lld, expected at most %d blocks of %lld",
                            operation, static_cast<long long>(rows), static_cast<long long>(dim),
                            INT32_MAX, static_cast<long long>(kCudaChunk));
  }
  *chunks = static_cast<unsigned int>(row_chunks);
  return Status();
}

using GramKernel = void (*)(sidestep_difference_gram_args, float*, unsigned int, bool);
using CorrectKernel = void (*)(sidestep_parareal_correct_args, float*, unsigned int, bool);

constexpr GramKernel kGramKernels[] = {difference_gram_kernel<1>, difference_gram_kernel<2>,
                                       difference_gram_kernel<3>, difference_gram_kernel<4>,
                                       difference_gram_kernel<5>, difference_gram_kernel<6>,
                                       difference_gram_kernel<7>};
constexpr CorrectKernel kCorrectKernels[] = {
    parareal_correct_kernel<1>, parareal_correct_kernel<2>, parareal_correct_kernel<3>,
    parareal_correct_kernel<4>, parareal_correct_kernel<5>, parareal_correct_kernel<6>};

}  // namespace

Status cuda_difference_gram(const sidestep_difference_gram_args& args, void* workspace,
                            void* stream_handle) {
  const Status status = check_difference_gram(args);
  if (!status.ok()) return status;
  if (args.rows == 0) return Status();
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const int columns = args.num_vectors;
  if (args.dim == 0) {
    const size_t bytes = args.rows * columns * columns * sizeof(float);
    return cuda_status("difference_gram", cudaMemsetAsync(args.gram, 0, bytes, stream));
  }
  unsigned int chunks = 0;
  const Status sizes = count_chunks("difference_gram", args.rows, args.dim, workspace, &chunks);
  if (!sizes.ok()) return sizes;
  const bool vectors = aligned(args.new_vectors) && aligned(args.old_vectors) && args.dim % P == 0;
  auto* sums = static_cast<float*>(workspace);
  const Status launched = launch("difference_gram", kGramKernels[columns - 1], args.rows * chunks,
                                 kThreads, stream, args, sums, chunks, vectors);
  if (!launched.ok()) return launched;
  return launch("difference_gram", finish_gram_kernel, args.rows, kThreads, stream, sums, args.gram,
                chunks, columns);
}

Status cuda_parareal_correct(const sidestep_parareal_correct_args& args, void* workspace,
                             void* stream_handle) {
  const Status status = check_parareal_correct(args);
  if (!status.ok()) return status;
  if (args.rows == 0) return Status();
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (args.dim == 0) {
    const size_t bytes = args.rows * 2 * sizeof(float);
    return cuda_status("parareal_correct_", cudaMemsetAsync(args.residual, 0, bytes, stream));
  }
  unsigned int chunks = 0;
  const Status sizes = count_chunks("parareal_correct_", args.rows, args.dim, workspace, &chunks);
  if (!sizes.ok()) return sizes;
  const bool vectors = aligned(args.boundary) && aligned(args.fine) && aligned(args.new_vectors) &&
                       aligned(args.old_vectors) && args.dim % P == 0;
  auto* sums = static_cast<float*>(workspace);
  const Status launched = launch("parareal_correct_", kCorrectKernels[args.num_registers - 1],
                                 args.rows * chunks, kThreads, stream, args, sums, chunks, vectors);
  if (!launched.ok()) return launched;
  return launch("parareal_correct_", finish_residual_kernel, args.rows, 2 * kWarp, stream, sums,
                args.residual, chunks, args.dim);
}

}  // namespace sidestep
