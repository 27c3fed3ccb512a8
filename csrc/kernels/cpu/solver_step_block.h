// The fused step on one chunk of one row, for one instruction set.
//
// Included by solver_step_{scalar,avx2,avx512}.cpp, which define SIDESTEP_ISA (a namespace) and
// SIDESTEP_WIDTH (floats per vector). All instruction sets give the same bits: no fused
// multiply-add, and partial sums run over 16 lanes in a fixed order.
#pragma once

#include "kernels/cpu/halves.h"
#include "kernels/cpu/lanes.h"
#include "kernels/cpu/solver_step_chunk.h"
#include "kernels/solver_step.h"

namespace sidestep {
namespace SIDESTEP_ISA {
namespace {

// A chunk of a row, every pointer at the chunk's first element.
struct Chunk {
  const StepProgram* program;
  uint32_t read;                     // bit j: some line reads column j
  int32_t dtype;                     // of outputs and inputs
  int64_t n;                         // elements
  float* registers[kMaxRegisters];   // [n] each
  const float* noise;                // [n]
  int branches;                      // guidance branches whose weight is not 0
  float weight[kMaxBranches];        // of those branches
  const char* output[kMaxBranches];  // [n] each
  int inputs;                        // model inputs to write
  char* input[kMaxBranches];         // [n] each
};

// Reads what the step uses of P vectors V from element i on: column[0..R+1] = registers, u, z.
template <int R, typename V, int P>
SIDESTEP_HOST_DEVICE void read_columns(const Chunk& chunk, int64_t i, V (&column)[R + 2][P]) {
  constexpr int64_t kStride = sizeof(V) / sizeof(float);
  SIDESTEP_UNROLL
  for (int j = 0; j < R + 2; ++j) {
    const bool read = (chunk.read >> j & 1u) != 0 && j != R;
    const float* from = j < R ? chunk.registers[j] : chunk.noise;
    SIDESTEP_UNROLL
    for (int p = 0; p < P; ++p) column[j][p] = read ? load<V>(from + i + p * kStride) : V{};
  }
  SIDESTEP_UNROLL
  for (int p = 0; p < P; ++p) column[R][p] = sum_start(chunk.branches > 0) - V{};
  for (int g = 0; g < chunk.branches; ++g) {
    V output[P];
    read_output(chunk.dtype, chunk.output[g], i, output);
    add_branch(chunk.weight[g], output, column[R]);
  }
}

// Stores P vectors V from element `at` on, and gathers their stats in the vectors of 16 lanes.
template <typename V, int P>
struct ChunkSink {
  const Chunk& chunk;
  int64_t at;
  V* change_sum;  // [kSums]
  V* error_sum;   // [kSums]

  static constexpr int64_t kStride = sizeof(V) / sizeof(float);
  static constexpr int kSums = P < kParts ? P : kParts;

  SIDESTEP_HOST_DEVICE void change(int p, V difference) {
    change_sum[p % kSums] += absolute(difference);
  }
  SIDESTEP_HOST_DEVICE void error(int p, V estimate) { error_sum[p % kSums] += absolute(estimate); }
  SIDESTEP_HOST_DEVICE void write(int line, const V (&sum)[P]) {
    SIDESTEP_UNROLL
    for (int p = 0; p < P; ++p) store(chunk.registers[line] + at + p * kStride, sum[p]);
  }
  SIDESTEP_HOST_DEVICE void input(const V (&scaled)[P]) {
    if (chunk.inputs == 0) return;
    write_inputs(chunk.dtype, chunk.input, chunk.inputs, at, scaled);
  }
};

template <int R, typename V, int P>
SIDESTEP_HOST_DEVICE void step_group(const Chunk& chunk, int64_t at, V* change, V* error) {
  V column[R + 2][P];
  read_columns<R, V, P>(chunk, at, column);
  ChunkSink<V, P> sink{chunk, at, change, error};
  step_columns<R, V, P>(*chunk.program, column, sink);
}

// Two groups of lanes at a time halve the branches, where all columns still fit the processor's
// registers.
template <int R>
constexpr bool kTwoGroups = R <= 2 && kWidth >= 8;

template <int R>
void step_elements(const Chunk& chunk, double sums[2]) {
  for (int64_t i = 0; i < chunk.n;) {
    const int64_t end = chunk.n - i < kBlock ? chunk.n : i + kBlock;
    Vec change[kParts] = {};
    Vec error[kParts] = {};
    if constexpr (kTwoGroups<R>) {
      for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
        step_group<R, Vec, 2 * kParts>(chunk, i, change, error);
      }
    }
    for (; i + kLanes <= end; i += kLanes) step_group<R, Vec, kParts>(chunk, i, change, error);
    float lanes[2][kLanes];
    __builtin_memcpy(lanes[0], change, sizeof(change));
    __builtin_memcpy(lanes[1], error, sizeof(error));
    for (int lane = 0; i < end; ++i, ++lane) {
      step_group<R, float, 1>(chunk, i, &lanes[0][lane], &lanes[1][lane]);
    }
    sums[0] += lane_total(lanes[0]);
    sums[1] += lane_total(lanes[1]);
  }
}

Chunk open_chunk(const sidestep_solver_step_args& args, const StepProgram& program, int64_t row,
                 int64_t slot, int64_t begin, int64_t end) {
  const int num_registers = args.num_registers;
  const int64_t size = args.dtype == SIDESTEP_FLOAT32 ? 4 : 2;
  const int64_t offset = row * args.dim + begin;
  Chunk chunk{};
  chunk.program = &program;
  chunk.read = columns_read(program, num_registers);
  chunk.dtype = args.dtype;
  chunk.n = end - begin;
  for (int j = 0; j < num_registers; ++j) {
    chunk.registers[j] = args.registers + (slot * num_registers + j) * args.dim + begin;
  }
  if (args.noise != nullptr) chunk.noise = args.noise + offset;
  for (int g = 0; g < args.num_branches; ++g) {
    const float weight = args.weights[row * args.num_branches + g];
    if (weight == 0.0f || (chunk.read >> num_registers & 1u) == 0) continue;
    chunk.weight[chunk.branches] = weight;
    chunk.output[chunk.branches++] = static_cast<const char*>(args.outputs[g]) + offset * size;
  }
  if (args.model_input == nullptr) return chunk;
  chunk.inputs = args.num_branches;
  for (int g = 0; g < chunk.inputs; ++g) {
    chunk.input[g] =
        static_cast<char*>(args.model_input) + (g * args.rows * args.dim + offset) * size;
  }
  return chunk;
}

}  // namespace

void step_chunk(const sidestep_solver_step_args& args, const StepProgram& program, int64_t row,
                int64_t slot, int64_t begin, int64_t end, double sums[2]) {
  const Chunk chunk = open_chunk(args, program, row, slot, begin, end);
  sums[0] = sums[1] = 0.0;
  switch (args.num_registers) {
    case 1:
      step_elements<1>(chunk, sums);
      break;
    case 2:
      step_elements<2>(chunk, sums);
      break;
    case 3:
      step_elements<3>(chunk, sums);
      break;
    case 4:
      step_elements<4>(chunk, sums);
      break;
    case 5:
      step_elements<5>(chunk, sums);
      break;
    default:
      step_elements<6>(chunk, sums);
      break;
  }
}

}  // namespace SIDESTEP_ISA
}  // namespace sidestep
