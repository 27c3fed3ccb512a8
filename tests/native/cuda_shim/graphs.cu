// The graph executor at work: graphs NAME runs one of the scenarios below and says what fails.
// tests/native/test_graphs.py runs it on the CPU under sanitizers, and on a GPU.
#include <string>
#include <thread>

#include "graphs.cuh"

namespace {

// A trajectory with graphs is the same bits as without, in ticks of m steps.
void equal() {
  for (const int64_t chain : {1, 3}) {
    for (const int32_t dtype : {SIDESTEP_FLOAT32, SIDESTEP_FLOAT16, SIDESTEP_BFLOAT16}) {
      Sizes sizes;
      sizes.chain = chain;
      sizes.dtype = dtype;
      sizes.dim = 131 + 2000 * dtype;  // one chunk and several
      sizes.steps = 9;
      const Stream stream;
      Ticks eager(sizes, stream);
      Ticks graphed(sizes, stream);
      const Graphs graphs(4);
      const std::vector<float> before = eager.registers.read(stream);
      const sidestep_tick by_graph = graphed.tick();
      const sidestep_tick by_itself = eager.tick();
      for (int64_t k = 0; k < sizes.steps; k += chain) {
        eager.place(k, stream);
        graphed.place(k, stream);
        succeed(sidestep_tick_enqueue(&by_itself, stream.handle));
        succeed(graphs.run(by_graph, stream));
        expect(same_bits(graphed.registers.read(stream), eager.registers.read(stream)),
               "registers with graphs");
        expect(same_bits(graphed.stats.read(stream), eager.stats.read(stream)),
               "stats with graphs");
      }
      expect(!same_bits(eager.registers.read(stream), before), "a tick changes registers");
      const int64_t ticks = sizes.steps / chain;
      graphs.expect_counts("a trajectory", 1, 1, 1, ticks - 1, 0);
      expect(graphed.calls == 2 * chain, "the model is called eagerly and in the capture alone");
      expect(eager.calls == sizes.steps, "the model is called at every step");
    }
  }
}

// A chain of m steps is the same bits as m ticks.
void chained() {
  const Stream stream;
  Sizes sizes;
  Ticks single(sizes, stream);
  sizes.chain = 4;
  Ticks chain(sizes, stream);
  const Graphs graphs(2);
  sidestep_tick one = single.tick();
  sidestep_tick four = chain.tick();
  // m steps need m weights and noises: those of a single tick are the first of each.
  for (sidestep_tick* tick : {&one, &four}) tick->args.noise = nullptr;
  const std::vector<float> weights(sizes.chain * sizes.rows * sizes.branches, 0.5f);
  const Array<float> all(weights.size());
  all.write(weights, stream);
  one.args.weights = four.args.weights = all.data();
  for (int64_t turn = 0; turn < 3; ++turn) {
    chain.place(4 * turn, stream);
    succeed(graphs.run(four, stream));
    for (int64_t j = 0; j < 4; ++j) {
      single.place(4 * turn + j, stream);
      succeed(graphs.run(one, stream));
    }
    expect(same_bits(chain.registers.read(stream), single.registers.read(stream)),
           "a chain is its steps");
  }
  graphs.expect_counts("chains and steps", 2, 2, 2, 2 + 11, 0);
}

// A hit goes to the front; the kind that was met longest ago makes room.
void eviction() {
  const Stream stream;
  Ticks ticks(Sizes(), stream);
  const Graphs graphs(2);
  const auto run = [&](int64_t plan) {
    sidestep_tick tick = ticks.tick();
    tick.plan = plan;
    succeed(graphs.run(tick, stream));
  };
  for (const int64_t plan : {0, 0, 1, 1, 0}) run(plan);
  graphs.expect_counts("two kinds", 2, 2, 2, 3, 0);
  run(2);  // in the place of 1
  graphs.expect_counts("a third", 2, 3, 2, 3, 1);
  run(0);
  graphs.expect_counts("the one that was met since", 2, 3, 2, 4, 1);
  run(1);  // as it is, in the place of 2
  run(1);
  graphs.expect_counts("the one that made room", 2, 4, 3, 5, 2);
}

void forget() {
  const Stream stream;
  Ticks ticks(Sizes(), stream);
  const Graphs graphs(2);
  const sidestep_tick tick = ticks.tick();
  for (int i = 0; i < 3; ++i) succeed(graphs.run(tick, stream));
  succeed(sidestep_graphs_forget(graphs.handle));  // waits for the last replay
  graphs.expect_counts("nothing is known", 0, 1, 1, 2, 0);
  succeed(sidestep_graphs_forget(graphs.handle));
  for (int i = 0; i < 2; ++i) succeed(graphs.run(tick, stream));
  graphs.expect_counts("from the beginning", 1, 2, 2, 3, 0);
}

// Ticks that differ in one thing each.
struct Kinds {
  const Stream stream;
  Ticks ticks;
  Ticks others;
  const Graphs graphs{100};
  sidestep_tensor tensors[2] = {};
  int64_t count = 0;

  explicit Kinds(const Sizes& sizes) : ticks(sizes, stream), others(sizes, stream) {
    tensors[0].data = &ticks;
    tensors[0].num_dims = 2;
    run("the first", tick());
  }
  sidestep_tick tick() {
    sidestep_tick made = ticks.tick();
    made.tensors = tensors;
    made.num_tensors = 1;
    return made;
  }
  void run(const char* what, const sidestep_tick& changed) {
    succeed(graphs.run(changed, stream));
    expect(graphs.counts().kept == ++count, std::string(what) + " is another kind");
  }
};

// Whatever of a tick is another makes another kind.
void keys() {
  Sizes sizes;
  sizes.chain = 2;
  Kinds kinds(sizes);
  const sidestep_tick other = kinds.others.tick();
  sidestep_tick t{};
#define CHANGED(name, value) \
  t = kinds.tick();          \
  t.name = value;            \
  kinds.run(#name, t)
  CHANGED(args.registers, other.args.registers);
  CHANGED(args.outputs[1], other.args.outputs[1]);
  CHANGED(args.weights, other.args.weights);
  CHANGED(args.noise, nullptr);
  CHANGED(args.table, other.args.table);
  CHANGED(args.step, other.args.step);
  CHANGED(args.slot, nullptr);
  CHANGED(args.stats, other.args.stats);
  CHANGED(args.model_input, other.args.model_input);
  CHANGED(args.slots, t.args.slots - 1);
  CHANGED(args.steps, t.args.steps - 1);
  CHANGED(args.rows, 1);
  CHANGED(args.dim, t.args.dim - 1);
  CHANGED(args.num_branches, 1);
  CHANGED(args.num_registers, 1);
  CHANGED(args.dtype, SIDESTEP_FLOAT16);
  CHANGED(read_table, nullptr);
  CHANGED(workspace, other.workspace);
  CHANGED(context, other.context);
  CHANGED(num_tensors, 2);
  CHANGED(plan, 1);
  CHANGED(chain, 1);
#undef CHANGED
  kinds.graphs.expect_counts("kinds", kinds.count, kinds.count, 0, 0, 0);
}

// So does a tensor of the model call.
void tensor_keys() {
  Kinds kinds(Sizes{});
#define CHANGED(name, value)     \
  kinds.tensors[0].name = value; \
  kinds.run(#name, kinds.tick())
  CHANGED(data, &kinds.others);
  CHANGED(shape[1], 5);
  CHANGED(strides[0], 5);
  CHANGED(dtype, 1);
  CHANGED(num_dims, 1);
#undef CHANGED
  kinds.tensors[0].shape[1] = 6;  // a dimension that it has no more
  succeed(kinds.graphs.run(kinds.tick(), kinds.stream));
  kinds.graphs.expect_counts("a second time", kinds.count, kinds.count, 1, 1, 0);
}

// A capture that breaks off at the second model call.
void broken(Fault fault, const std::string& reason) {
  const Stream stream;
  Sizes sizes;
  sizes.chain = 2;
  Ticks ticks(sizes, stream);
  const Graphs graphs(2);
  const sidestep_tick tick = ticks.tick();
  succeed(graphs.run(tick, stream));
  const std::vector<float> before = ticks.registers.read(stream);
  for (int again = 0; again < 2; ++again) {
    ticks.fault = fault;
    expect(graphs.run(tick, stream) == SIDESTEP_FAILED, "a broken capture fails");
    const std::string wanted =
        "tick: capturing it in a CUDA graph failed at the model call of step 1: " + reason;
    expect(std::string(sidestep_error()).rfind(wanted, 0) == 0,
           std::string("the error: ") + sidestep_error());
    cudaStreamCaptureStatus state = cudaStreamCaptureStatusActive;
    check(cudaStreamIsCapturing(stream.handle, &state));
    expect(state == cudaStreamCaptureStatusNone, "the stream does not capture");
    expect(cudaGetLastError() == cudaSuccess, "no error is left for the next call");
    expect(same_bits(ticks.registers.read(stream), before), "nothing of it has run");
  }
  graphs.expect_counts("no graph", 1, 1, 0, 0, 0);
  ticks.fault = Fault::kNone;
  succeed(sidestep_tick_enqueue(&tick, stream.handle));
  expect(!same_bits(ticks.registers.read(stream), before), "the tick without a graph");
  succeed(graphs.run(tick, stream));
  graphs.expect_counts("a graph after all", 1, 1, 1, 1, 0);
}

// A failure of a tick that runs as it is.
void eager_failure() {
  const Stream stream;
  Sizes sizes;
  sizes.chain = 2;
  Ticks ticks(sizes, stream);
  const Graphs graphs(2);
  const sidestep_tick tick = ticks.tick();
  for (const Fault fault : {Fault::kReturns, Fault::kThrows}) {
    ticks.fault = fault;
    expect(graphs.run(tick, stream) == SIDESTEP_FAILED, "a tick fails");
    const std::string reason =
        fault == Fault::kReturns ? "the callback returned 7" : "the callback threw: no such prompt";
    const std::string wanted = "tick: the model call of step 1 failed: " + reason;
    expect(std::string(sidestep_error()) == wanted, std::string("the error: ") + sidestep_error());
  }
  graphs.expect_counts("not a kind yet", 0, 0, 0, 0, 0);
}

void refused() {
  const Stream stream;
  Ticks ticks(Sizes(), stream);
  const Graphs graphs(2);
  const auto refuse = [&](const sidestep_tick& tick, void* on, const std::string& sentence) {
    ticks.calls = 0;
    expect(sidestep_graphs_run(graphs.handle, &tick, on) == SIDESTEP_INVALID_ARGUMENT, sentence);
    expect(sentence == sidestep_error(), std::string("the error: ") + sidestep_error());
    expect(ticks.calls == 0, "the model is not called: " + sentence);
  };
  sidestep_tick tick = ticks.tick();
  refuse(tick, nullptr, "tick: stream is the default stream, expected one that can capture");
  check(cudaStreamBeginCapture(stream.handle, cudaStreamCaptureModeThreadLocal));
  refuse(tick, stream.handle, "tick: stream captures already, expected one that does not");
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(stream.handle, &graph));
  check(cudaGraphDestroy(graph));
#define CHANGED(name, value, sentence) \
  tick = ticks.tick();                 \
  tick.name = value;                   \
  refuse(tick, stream.handle, sentence)
  CHANGED(chain, 0, "tick: chain is 0, expected at least 1");
  CHANGED(model, nullptr, "tick: model is null, expected a function");
  CHANGED(args.model_input, nullptr,
          "tick: model_input is null, expected an address beside read_table");
  CHANGED(args.registers, nullptr, "solver_step: registers is null, expected an address");
  CHANGED(args.dtype, 3,
          "solver_step: dtype is 3, expected 0 (float32), 1 (float16) or 2 (bfloat16)");
  CHANGED(read_table, ticks.registers.data(),
          "solver_step: registers overlaps table in memory, expected separate tensors");
#undef CHANGED
  sidestep_tensor tensor{};
  tensor.num_dims = 9;
  tick = ticks.tick();
  tick.tensors = &tensor;
  tick.num_tensors = 1;
  refuse(tick, stream.handle, "tick: tensors[0] has 9 dimensions, expected 0 to 8");
  const sidestep_graphs_options none{0};
  sidestep_graphs* handle = nullptr;
  expect(sidestep_graphs_create(&none, &handle) == SIDESTEP_INVALID_ARGUMENT && handle == nullptr &&
             std::string(sidestep_error()) == "graphs: kept is 0, expected at least 1",
         "graphs that keep nothing");
  graphs.expect_counts("nothing", 0, 0, 0, 0, 0);
}

// Two threads and one handle, each with a stream and memory of its own.
void threads() {
  const Graphs graphs(2);
  std::vector<float> results[2];
  std::vector<std::thread> workers;
  for (std::vector<float>& result : results) {
    workers.emplace_back([&graphs, &result] {
      const Stream stream;
      Ticks ticks(Sizes(), stream);
      const sidestep_tick tick = ticks.tick();
      for (int64_t k = 0; k < 6; ++k) {
        ticks.place(k, stream);
        succeed(graphs.run(tick, stream));
      }
      result = ticks.registers.read(stream);
      succeed(sidestep_graphs_forget(graphs.handle));  // before the memory goes
    });
  }
  for (std::thread& worker : workers) worker.join();
  expect(same_bits(results[0], results[1]), "threads do not mix");
}

struct Scenario {
  const char* name;
  void (*run)();
};

const Scenario kScenarios[] = {
    {"equal", equal},
    {"chained", chained},
    {"eviction", eviction},
    {"forget", forget},
    {"keys", keys},
    {"tensor-keys", tensor_keys},
    {"returns", [] { broken(Fault::kReturns, "the callback returned 7"); }},
    {"throws", [] { broken(Fault::kThrows, "the callback threw: no such prompt"); }},
    {"waits", [] { broken(Fault::kWaits, "something in it is not permitted there: operation "); }},
    {"ends-capture", [] { broken(Fault::kEndsCapture, "the stream does not capture any more"); }},
    {"eager-failure", eager_failure},
    {"refused", refused},
    {"threads", threads},
    {"rows", rows},
};

}  // namespace

int main(int argc, char** argv) {
  for (const Scenario& scenario : kScenarios) {
    if (argc < 2 || std::strcmp(argv[1], scenario.name) != 0) continue;
    scenario.run();
    return g_failures == 0 ? 0 : 1;
  }
  stop("expected the name of a scenario");
}
