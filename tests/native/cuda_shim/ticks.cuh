// Ticks of a model that a few lines compute, for graphs.cu: on the CPU under the shim, or on a GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "core/table.h"
#include "kernels/cuda/dtype.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/launch.h"
#include "sidestep/graphs.h"

[[noreturn]] inline void stop(const char* sentence) {
  std::fprintf(stderr, "graphs: %s\n", sentence);
  std::exit(2);
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess) stop(cudaGetErrorString(error));
}

inline void succeed(sidestep_status status) {
  if (status != SIDESTEP_OK) stop(sidestep_error());
}

struct Stream {
  cudaStream_t handle = nullptr;

  Stream() { check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking)); }
  Stream(const Stream&) = delete;
  ~Stream() { check(cudaStreamDestroy(handle)); }
  void wait() const { check(cudaStreamSynchronize(handle)); }
};

// An array on the device that ends where its elements end.
template <typename T>
class Array {
 public:
  explicit Array(size_t count) : count_(count) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, count * sizeof(T)));
    data_ = static_cast<T*>(memory);
  }
  Array(const Array&) = delete;
  ~Array() { check(cudaFree(data_)); }

  T* data() const { return data_; }
  void write(const std::vector<T>& from, const Stream& stream, size_t at = 0) const {
    const size_t bytes = from.size() * sizeof(T);
    check(cudaMemcpyAsync(data_ + at, from.data(), bytes, cudaMemcpyHostToDevice, stream.handle));
    stream.wait();
  }
  std::vector<T> read(const Stream& stream) const {
    std::vector<T> to(count_);
    const size_t bytes = count_ * sizeof(T);
    check(cudaMemcpyAsync(to.data(), data_, bytes, cudaMemcpyDeviceToHost, stream.handle));
    stream.wait();
    return to;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

// Numbers in [-1, 1), the same on every machine.
inline std::vector<float> numbers(size_t count, uint32_t seed) {
  std::vector<float> values(count);
  for (float& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(seed >> 8) * (2.0f / 16777216.0f) - 1.0f;
  }
  return values;
}

// outputs[g] = (0.5 + g) x + 0.01 k, for each row at its step k.
template <typename T>
__global__ void model_kernel(const T* x,           // [rows, D] of branch g
                             T* output,            // [rows, D]
                             const int64_t* step,  // [rows]
                             const float scale, const int64_t dim) {
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
    const int64_t at = blockIdx.x * dim + i;
    const float offset = 0.01f * static_cast<float>(step[blockIdx.x]);
    output[at] = sidestep::from_float<T>(scale * sidestep::to_float(x[at]) + offset);
  }
}

struct Sizes {
  int64_t rows = 2;
  int64_t slots = 3;
  int64_t dim = 131;
  int64_t chain = 1;
  int32_t registers = 2;
  int32_t branches = 2;
  int32_t dtype = SIDESTEP_FLOAT32;
  int64_t steps = 12;  // of the plan
};

// What a callback does at step 1 instead of its work.
enum class Fault { kNone, kReturns, kThrows, kWaits, kEndsCapture };

// Memory of a tick, and its model.
class Ticks {
 public:
  Ticks(const Sizes& sizes, const Stream& stream)
      : sizes(sizes),
        registers(sizes.slots * sizes.registers * sizes.dim),
        step(sizes.chain * sizes.rows),
        slot(sizes.rows),
        stats(sizes.chain * sizes.rows * 2),
        element_(sizes.dtype == SIDESTEP_FLOAT32 ? 4 : 2),
        outputs_(sizes.branches * sizes.rows * sizes.dim * element_),
        input_(sizes.branches * sizes.rows * sizes.dim * element_),
        weights_(sizes.chain * sizes.rows * sizes.branches),
        noise_(sizes.chain * sizes.rows * sizes.dim),
        table_(sizes.steps * width()),
        read_table_(sizes.steps * width()),
        workspace_(sidestep::cuda_solver_step_workspace(sizes.rows, sizes.dim)) {
    registers.write(numbers(sizes.slots * sizes.registers * sizes.dim, 1), stream);
    weights_.write(numbers(sizes.chain * sizes.rows * sizes.branches, 2), stream);
    noise_.write(numbers(sizes.chain * sizes.rows * sizes.dim, 3), stream);
    table_.write(plan(), stream);
    read_table_.write(reading(), stream);
    check(cudaMemsetAsync(input_.data(), 0, sizes.branches * sizes.rows * sizes.dim * element_,
                          stream.handle));
    check(cudaMemsetAsync(workspace_.data(), 0,
                          sidestep::cuda_solver_step_workspace(sizes.rows, sizes.dim),
                          stream.handle));
    place(0, stream);
  }

  // All rows at a step, each in a slot of its own, the last one first.
  void place(int64_t k, const Stream& stream) const {
    std::vector<int64_t> steps;
    std::vector<int64_t> slots;
    for (int64_t j = 0; j < sizes.chain; ++j) steps.insert(steps.end(), sizes.rows, k + j);
    for (int64_t i = 0; i < sizes.rows; ++i) slots.push_back(sizes.slots - 1 - i);
    step.write(steps, stream);
    slot.write(slots, stream);
  }

  sidestep_tick tick() {
    sidestep_tick tick{};
    tick.args.registers = registers.data();
    for (int32_t g = 0; g < sizes.branches; ++g) tick.args.outputs[g] = branch(outputs_, g);
    tick.args.weights = weights_.data();
    tick.args.noise = noise_.data();
    tick.args.table = table_.data();
    tick.args.step = step.data();
    tick.args.slot = slot.data();
    tick.args.model_input = input_.data();
    tick.args.stats = stats.data();
    tick.args.slots = sizes.slots;
    tick.args.dim = sizes.dim;
    tick.args.rows = sizes.rows;
    tick.args.steps = sizes.steps;
    tick.args.num_registers = sizes.registers;
    tick.args.num_branches = sizes.branches;
    tick.args.dtype = sizes.dtype;
    tick.read_table = read_table_.data();
    tick.workspace = workspace_.data();
    tick.model = model;
    tick.context = this;
    tick.chain = sizes.chain;
    return tick;
  }

  const Sizes sizes;
  const Array<float> registers;  // [slots, R, D]
  const Array<int64_t> step;     // [m, rows]
  const Array<int64_t> slot;     // [rows]
  const Array<float> stats;      // [m, rows, 2]
  Fault fault = Fault::kNone;
  int64_t calls = 0;  // of the model, a capture's included

 private:
  int64_t width() const { return sidestep::table_width(sizes.registers); }

  char* branch(const Array<char>& memory, int32_t g) const {
    return memory.data() + g * sizes.rows * sizes.dim * static_cast<int64_t>(element_);
  }

  static float input_scale(int64_t k) { return 0.5f + 0.125f * static_cast<float>(k); }

  // Any lines, and the next step's input scale.
  std::vector<float> plan() const {
    std::vector<float> table = numbers(sizes.steps * width(), 4);
    for (int64_t k = 0; k < sizes.steps; ++k) table[(k + 1) * width() - 1] = input_scale(k + 1);
    return table;
  }

  // Lines of unit vectors, an E of zeros, and an input scale.
  std::vector<float> reading() const {
    std::vector<float> table(sizes.steps * width());
    for (int64_t k = 0; k < sizes.steps; ++k) {
      float* line = &table[k * width()];
      for (int32_t i = 0; i < sizes.registers; ++i) line[i * (sizes.registers + 2) + i] = 1.0f;
      line[width() - 1] = input_scale(k);
    }
    return table;
  }

  template <typename T>
  void enqueue(int64_t j, cudaStream_t stream) const {
    for (int32_t g = 0; g < sizes.branches; ++g) {
      const auto status = sidestep::launch(
          "model", model_kernel<T>, sizes.rows, 64, stream,
          reinterpret_cast<const T*>(branch(input_, g)), reinterpret_cast<T*>(branch(outputs_, g)),
          step.data() + j * sizes.rows, 0.5f + static_cast<float>(g), sizes.dim);
      if (!status.ok()) stop(status.message().c_str());
    }
  }

  static int32_t model(void* context, int64_t j, void* handle) {
    auto& ticks = *static_cast<Ticks*>(context);
    const auto stream = static_cast<cudaStream_t>(handle);
    ++ticks.calls;
    if (j == 1 && ticks.fault != Fault::kNone) return ticks.fail(stream);
    switch (ticks.sizes.dtype) {
      case SIDESTEP_FLOAT32:
        ticks.enqueue<float>(j, stream);
        break;
      case SIDESTEP_FLOAT16:
        ticks.enqueue<__half>(j, stream);
        break;
      default:
        ticks.enqueue<__nv_bfloat16>(j, stream);
    }
    return 0;
  }

  int32_t fail(cudaStream_t stream) const {
    cudaGraph_t graph = nullptr;
    switch (fault) {
      case Fault::kThrows:
        throw std::runtime_error("no such prompt");
      case Fault::kWaits:
        cudaStreamSynchronize(stream);  // and does not look at what it returns
        return 0;
      case Fault::kEndsCapture:
        check(cudaStreamEndCapture(stream, &graph));
        check(cudaGraphDestroy(graph));
        return 0;
      default:
        return 7;
    }
  }

  const size_t element_;
  const Array<char> outputs_;  // [G, rows, D] of dtype
  const Array<char> input_;    // [G, rows, D] of dtype
  const Array<float> weights_;
  const Array<float> noise_;
  const Array<float> table_;
  const Array<float> read_table_;
  const Array<char> workspace_;
};
