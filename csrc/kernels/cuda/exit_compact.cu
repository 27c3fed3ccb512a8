// The exit operators on the GPU: one block decides, and one block per piece of a row moves.
//
// Every thread writes what no other thread reads or writes between two barriers, and a move reads
// an element before it writes there, so all moves may run at once. Nothing is allocated and nothing
// waits: a CUDA graph may capture it.
#include <cuda_runtime.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/exit_compact.h"
#include "kernels/launch.h"

namespace sidestep {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kUnits = 4;  // accesses of a thread to what it moves

struct Rank {
  int64_t before;  // the sum over the threads before this one
  int64_t total;   // over the block
};

// Called by all threads of the block.
__device__ __forceinline__ Rank block_rank(int64_t count) {
  __shared__ int64_t of_warp[kWarps];
  const int64_t up_to = warp_scan(count);
  if (threadIdx.x % kWarp == kWarp - 1) of_warp[threadIdx.x / kWarp] = up_to;
  __syncthreads();
  Rank rank{up_to - count, 0};
  for (int w = 0; w < kWarps; ++w) {
    if (w < static_cast<int>(threadIdx.x) / kWarp) rank.before += of_warp[w];
    rank.total += of_warp[w];
  }
  __syncthreads();  // who comes next may write of_warp
  return rank;
}

// Each row's group, or -1 where there is no such one: it stays.
__device__ __forceinline__ int64_t group_of(const ExitDecideArgs& args, int64_t r) {
  const int64_t g = args.group != nullptr ? args.group[r] : r;
  return g >= 0 && g < args.rows ? g : -1;
}

__device__ __forceinline__ bool stays(const ExitDecideArgs& args, const unsigned int* uncertain,
                                      int64_t r) {
  const int64_t g = group_of(args, r);
  return g < 0 || uncertain[g] != 0;
}

// Thread t decides about rows [begin, end), in order.
__global__ void __launch_bounds__(kThreads)
    exit_decide_kernel(const ExitDecideArgs args,
                       unsigned int* uncertain) {  // [rows] of each group: rows that do not leave
  const int64_t share = (args.rows + kThreads - 1) / kThreads;
  const int64_t begin = threadIdx.x * share;
  const int64_t end = begin + share < args.rows ? begin + share : args.rows;
  for (int64_t r = begin; r < end; ++r) uncertain[r] = 0;
  __syncthreads();
  for (int64_t r = begin; r < end; ++r) {
    const int64_t g = group_of(args, r);
    if (g >= 0 && !(args.score[r] <= args.limit[r])) atomicAdd(uncertain + g, 1u);  // NaN stays
  }
  __syncthreads();
  int64_t count = 0;
  for (int64_t r = begin; r < end; ++r) count += stays(args, uncertain, r) ? 0 : 1;
  const Rank leaving = block_rank(count);
  const int64_t kept = args.rows - leaving.total;
  int64_t* leaves = args.order + kept + leaving.before;
  int64_t tail = 0;  // rows that stay, from `kept` on
  for (int64_t r = begin; r < end; ++r) {
    if (!stays(args, uncertain, r)) {
      *leaves++ = r;
    } else if (r < kept) {
      args.order[r] = r;
    } else {
      ++tail;
    }
  }
  const int64_t* hole = args.order + kept + block_rank(tail).before;  // the first that leave
  for (int64_t r = begin; r < end; ++r) {
    if (r >= kept && stays(args, uncertain, r)) args.order[*hole++] = r;
  }
  if (threadIdx.x == 0) *args.kept = kept;
}

// The units of one thread, block width apart, that exist; all loads come before their first use.
template <typename Unit>
__device__ __forceinline__ void read_units(const Unit* from, int64_t count, Unit (&units)[kUnits]) {
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    if (i * kThreads < count) units[i] = from[i * kThreads];
  }
}

template <typename Unit>
__device__ __forceinline__ void write_units(const Unit (&units)[kUnits], int64_t count, Unit* to) {
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    if (i * kThreads < count) to[i * kThreads] = units[i];
  }
}

// Both moves of one piece of entry `order[e]`, if it leaves.
template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    exit_compact_kernel(const ExitCompactArgs args, const unsigned int pieces) {
  const int64_t entry = blockIdx.x / pieces;
  const int64_t kept = *args.kept;
  if (entry < kept) return;
  const int64_t r = args.order[entry];
  if (r < 0 || r >= args.rows) return;
  const int64_t p = args.place[r];
  if (p < 0 || p >= args.places) return;
  const int64_t row_units = args.row_bytes / static_cast<int64_t>(sizeof(Unit));
  const int64_t at = int64_t{blockIdx.x % pieces} * kThreads * kUnits + threadIdx.x;
  const int64_t count = row_units - at;
  auto* hidden = static_cast<Unit*>(args.hidden) + at;
  Unit leaving[kUnits];
  read_units(hidden + r * row_units, count, leaving);
  const int64_t source = r < kept ? args.order[r] : -1;  // who fills the hole
  const bool fills = source >= kept && source < args.rows && r < kept;
  Unit staying[kUnits];
  if (fills) read_units(hidden + source * row_units, count, staying);
  write_units(leaving, count, static_cast<Unit*>(args.out) + at + p * row_units);
  if (fills) write_units(staying, count, hidden + r * row_units);
}

using CompactKernel = void (*)(ExitCompactArgs, unsigned int);

// The widest accesses that begin at a multiple of their size in every row, and that width.
CompactKernel kernel_for(const ExitCompactArgs& args, int64_t* width) {
  const uint64_t offsets = reinterpret_cast<uintptr_t>(args.hidden) |
                           reinterpret_cast<uintptr_t>(args.out) |
                           static_cast<uint64_t>(args.row_bytes);
  *width = 1;
  while (*width < 16 && offsets % (2 * *width) == 0) *width *= 2;
  if (*width == 8) *width = 4;
  switch (*width) {
    case 16:
      return exit_compact_kernel<uint4>;
    case 4:
      return exit_compact_kernel<uint32_t>;
    case 2:
      return exit_compact_kernel<uint16_t>;
    default:
      return exit_compact_kernel<uint8_t>;
  }
}

}  // namespace

Status cuda_exit_decide(const ExitDecideArgs& args, void* workspace, void* stream_handle) {
  const Status sizes = check_exit_decide(args);
  if (!sizes.ok()) return sizes;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (args.rows == 0) {
    return cuda_status("exit_decide", cudaMemsetAsync(args.kept, 0, sizeof(int64_t), stream));
  }
  const Status scratch = check_workspace("exit_decide", workspace);
  if (!scratch.ok()) return scratch;
  return launch("exit_decide", exit_decide_kernel, 1, kThreads, stream, args,
                static_cast<unsigned int*>(workspace));
}

Status cuda_exit_compact(const ExitCompactArgs& args, void* stream_handle) {
  const Status sizes = check_exit_compact(args);
  if (!sizes.ok()) return sizes;
  if (args.rows == 0 || args.places == 0 || args.row_bytes == 0) return Status();
  int64_t width = 0;
  const CompactKernel kernel = kernel_for(args, &width);
  const int64_t piece_bytes = width * kThreads * kUnits;
  const int64_t pieces = (args.row_bytes + piece_bytes - 1) / piece_bytes;
  if (pieces > INT32_MAX / args.rows) {
    return invalid_argument(
        "exit_compact_: rows * bytes of a row is %lld * %lld, expected at most %d blocks of %lld",
        static_cast<long long>(args.rows), static_cast<long long>(args.row_bytes), INT32_MAX,
        static_cast<long long>(piece_bytes));
  }
  return launch("exit_compact_", kernel, args.rows * pieces, kThreads,
                static_cast<cudaStream_t>(stream_handle), args, static_cast<unsigned int>(pieces));
}

}  // namespace sidestep
