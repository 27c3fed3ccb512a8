// Runs recorded calls of the CUDA launchers: replay CALLS RESULTS [graph], both written and read by
// cuda_calls.py. With `graph` a call is captured, and runs when its graph is launched.
//
// A file is a row of int64 numbers and arrays; an array is its bytes (-1: null), how many bytes its
// address is off a multiple of 16, and its data. Every array gets an allocation that ends where it
// ends, so that AddressSanitizer sees one byte too far.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <string>

#include "kernels/launch.h"

namespace {

[[noreturn]] void stop(const std::string& sentence) {
  std::fprintf(stderr, "replay: %s\n", sentence.c_str());
  std::exit(2);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) stop(cudaGetErrorString(error));
}

struct Array {
  char* memory = nullptr;
  char* data = nullptr;
  int64_t bytes = 0;

  Array(int64_t size, int64_t offset) : bytes(size) {
    if (size < 0) return;
    memory = static_cast<char*>(std::malloc(static_cast<size_t>(size + offset)));
    data = memory + offset;
  }
  Array(const Array&) = delete;
  ~Array() { std::free(memory); }
};

class Call {
 public:
  Call(FILE* calls, FILE* results, bool graph) : calls_(calls), results_(results), graph_(graph) {}

  int64_t number() {
    int64_t value = 0;
    if (std::fread(&value, sizeof(value), 1, calls_) != 1) stop("the calls end in a call");
    return value;
  }
  template <typename T>
  T* array() {
    const int64_t bytes = number();
    const int64_t offset = number();
    const Array& array = arrays_.emplace_back(bytes, offset);
    if (bytes > 0 && std::fread(array.data, 1, bytes, calls_) != static_cast<size_t>(bytes)) {
      stop("the calls end in an array");
    }
    return reinterpret_cast<T*>(array.data);
  }
  template <typename T>
  T* written() {
    T* data = array<T>();
    written_.push_back(&arrays_.back());
    return data;
  }
  // `fill` stands for what a reused workspace still holds.
  char* workspace(int64_t bytes, int fill) {
    const Array& array = arrays_.emplace_back(bytes, 0);
    std::memset(array.data, fill, static_cast<size_t>(bytes));
    return array.data;
  }
  // Runs `launch` on `args`, which are gone before a graph runs.
  template <typename Args>
  void run(sidestep::Status (*launch)(const Args&, void*, void*), Args args, char* workspace) {
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    if (graph_) check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    const sidestep::Status status = launch(args, workspace, stream);
    if (!status.ok()) stop(status.message());
    if (graph_) {
      check(cudaStreamEndCapture(stream, &graph));
      check(cudaGraphInstantiateWithFlags(&executable, graph, 0));
      check(cudaGraphDestroy(graph));
      std::memset(&args, 0xff, sizeof(args));
      check(cudaGraphLaunch(executable, stream));
    }
    check(cudaStreamSynchronize(stream));
    if (graph_) check(cudaGraphExecDestroy(executable));
    check(cudaStreamDestroy(stream));
    for (const Array* array : written_) {
      if (array->bytes > 0) std::fwrite(array->data, 1, array->bytes, results_);
    }
  }

 private:
  FILE* calls_;
  FILE* results_;
  bool graph_;
  std::deque<Array> arrays_;
  std::deque<const Array*> written_;
};

void solver_step(Call& call) {
  sidestep_solver_step_args args{};
  args.slots = call.number();
  args.num_registers = static_cast<int32_t>(call.number());
  args.dim = call.number();
  args.num_branches = static_cast<int32_t>(call.number());
  args.dtype = static_cast<int32_t>(call.number());
  args.steps = call.number();
  args.rows = call.number();
  args.registers = call.written<float>();
  args.model_input = call.written<void>();
  args.stats = call.written<float>();
  for (int g = 0; g < args.num_branches; ++g) args.outputs[g] = call.array<void>();
  args.weights = call.array<float>();
  args.noise = call.array<float>();
  args.table = call.array<float>();
  args.step = call.array<int64_t>();
  args.slot = call.array<int64_t>();
  char* workspace = call.workspace(sidestep::cuda_solver_step_workspace(args.rows, args.dim), '\0');
  call.run(sidestep::cuda_solver_step, args, workspace);
  for (int i = 0; i < sidestep::kCudaWorkspaceHeader; ++i) {
    if (workspace[i] != 0) stop("solver_step: the counter of the workspace is not left at 0");
  }
}

void difference_gram(Call& call) {
  sidestep_difference_gram_args args{};
  args.rows = call.number();
  args.num_vectors = static_cast<int32_t>(call.number());
  args.dim = call.number();
  args.gram = call.written<float>();
  args.new_vectors = call.array<float>();
  args.old_vectors = call.array<float>();
  const int64_t bytes =
      sidestep::cuda_difference_gram_workspace(args.rows, args.dim, args.num_vectors);
  call.run(sidestep::cuda_difference_gram, args, call.workspace(bytes, 0xff));
}

void parareal_correct(Call& call) {
  sidestep_parareal_correct_args args{};
  args.rows = call.number();
  args.num_registers = static_cast<int32_t>(call.number());
  args.dim = call.number();
  args.boundary = call.written<float>();
  args.residual = call.written<float>();
  args.fine = call.array<float>();
  args.new_vectors = call.array<float>();
  args.old_vectors = call.array<float>();
  args.coefficients = call.array<float>();
  const int64_t bytes = sidestep::cuda_parareal_correct_workspace(args.rows, args.dim);
  call.run(sidestep::cuda_parareal_correct, args, call.workspace(bytes, 0xff));
}

void exit_decide(Call& call) {
  sidestep::ExitDecideArgs args{};
  args.rows = call.number();
  args.order = call.written<int64_t>();
  args.kept = call.written<int64_t>();
  args.score = call.array<float>();
  args.limit = call.array<float>();
  args.group = call.array<int64_t>();
  char* workspace = call.workspace(sidestep::cuda_exit_decide_workspace(args.rows), 0xff);
  call.run(sidestep::cuda_exit_decide, args, workspace);
}

sidestep::Status compact(const sidestep::ExitCompactArgs& args, void*, void* stream) {
  return sidestep::cuda_exit_compact(args, stream);
}

void exit_compact(Call& call) {
  sidestep::ExitCompactArgs args{};
  args.rows = call.number();
  args.places = call.number();
  args.row_bytes = call.number();
  args.hidden = call.written<void>();
  args.out = call.written<void>();
  args.order = call.array<int64_t>();
  args.kept = call.array<int64_t>();
  args.place = call.array<int64_t>();
  call.run(compact, args, nullptr);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) stop("expected CALLS RESULTS [graph]");
  FILE* calls = std::fopen(argv[1], "rb");
  FILE* results = std::fopen(argv[2], "wb");
  if (calls == nullptr || results == nullptr) stop("cannot open CALLS or RESULTS");
  using Operation = void (*)(Call&);
  constexpr Operation kOperations[] = {solver_step, difference_gram, parareal_correct, exit_decide,
                                       exit_compact};
  int64_t operation = 0;
  while (std::fread(&operation, sizeof(operation), 1, calls) == 1) {
    Call call(calls, results, argc > 3);
    kOperations[operation](call);
  }
  return std::fclose(results) == 0 ? 0 : 1;
}
