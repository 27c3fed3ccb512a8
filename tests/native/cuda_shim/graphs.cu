// The graph executor at work: graphs NAME runs one of the scenarios below and says what fails.
// tests/native/test_graphs.py runs it on the CPU under sanitizers, and on a GPU.
#include <memory>
#include <string>
#include <thread>

#include "sidestep/scheduler.h"
#include "ticks.cuh"

namespace {

int g_failures = 0;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what.c_str());
  ++g_failures;
}

// No kind is forgotten before `kept` others.
struct Graphs {
  sidestep_graphs* handle = nullptr;

  explicit Graphs(int64_t kept) {
    const sidestep_graphs_options options{kept};
    succeed(sidestep_graphs_create(&options, &handle));
  }
  Graphs(const Graphs&) = delete;
  ~Graphs() { sidestep_graphs_destroy(handle); }

  sidestep_status run(const sidestep_tick& tick, const Stream& stream) const {
    return sidestep_graphs_run(handle, &tick, stream.handle);
  }
  sidestep_graphs_counts counts() const {
    sidestep_graphs_counts counts{};
    succeed(sidestep_graphs_count(handle, &counts));
    return counts;
  }
  void expect_counts(const char* when, int64_t kept, int64_t enqueued, int64_t captured,
                     int64_t replayed, int64_t dropped) const {
    const sidestep_graphs_counts c = counts();
    const bool equal = c.kept == kept && c.enqueued == enqueued && c.captured == captured &&
                       c.replayed == replayed && c.dropped == dropped;
    expect(equal, std::string(when) + ": kept " + std::to_string(c.kept) + ", enqueued " +
                      std::to_string(c.enqueued) + ", captured " + std::to_string(c.captured) +
                      ", replayed " + std::to_string(c.replayed) + ", dropped " +
                      std::to_string(c.dropped));
  }
};

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// A trajectory with graphs is the same bits as without, in ticks of m steps.
void equal() {
  for (const int64_t chain : {1, 3}) {
    for (const int32_t dtype : {SIDESTEP_FLOAT32, SIDESTEP_FLOAT16, SIDESTEP_BFLOAT16}) {
      Sizes sizes;
      sizes.chain = chain;
      sizes.dtype = dtype;
      sizes.dim = 131 + 2000 * dtype;  // one chunk and several
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

// Whatever of a tick is another makes another kind.
void keys() {
  const Stream stream;
  Sizes sizes;
  sizes.chain = 2;
  Ticks ticks(sizes, stream);
  Ticks others(sizes, stream);
  const Graphs graphs(100);
  sidestep_tensor tensors[2] = {};
  tensors[0].data = &ticks;
  tensors[0].num_dims = 2;
  const auto tick = [&] {
    sidestep_tick made = ticks.tick();
    made.tensors = tensors;
    made.num_tensors = 1;
    return made;
  };
  int64_t kinds = 0;
  const auto run = [&](const char* what, const sidestep_tick& changed) {
    succeed(graphs.run(changed, stream));
    expect(graphs.counts().kept == ++kinds, std::string(what) + " is another kind");
  };
  const sidestep_tick other = others.tick();
  run("the first", tick());
  sidestep_tick t = tick();
#define CHANGED(name, value) \
  t = tick();                \
  t.name = value;            \
  run(#name, t)
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
#define CHANGED(name, value) \
  tensors[0].name = value;   \
  run("a tensor's " #name, tick())
  CHANGED(data, &others);
  CHANGED(shape[1], 5);
  CHANGED(strides[0], 5);
  CHANGED(dtype, 1);
  CHANGED(num_dims, 1);
#undef CHANGED
  tensors[0].shape[1] = 6;  // a dimension that it has no more
  succeed(graphs.run(tick(), stream));
  expect(graphs.counts().kept == kinds, "what is left of a shape does not count");
  graphs.expect_counts("a second time", kinds, kinds, 1, 1, 0);
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

// One request alone, without graphs.
std::vector<float> alone(const Sizes& of_all, uint32_t seed, int64_t steps, const Stream& stream) {
  Sizes sizes = of_all;
  sizes.rows = sizes.slots = 1;
  Ticks ticks(sizes, stream);
  ticks.registers.write(numbers(sizes.registers * sizes.dim, seed), stream);
  sidestep_tick tick = ticks.tick();
  tick.args.noise = nullptr;
  const std::vector<float> weight(1, 0.75f);
  const Array<float> weights(1);
  weights.write(weight, stream);
  tick.args.weights = weights.data();
  for (int64_t k = 0; k < steps; ++k) {
    ticks.place(k, stream);
    succeed(sidestep_tick_enqueue(&tick, stream.handle));
  }
  return ticks.registers.read(stream);
}

// Requests of different lengths through the row scheduler, in buckets of 2 and 4 rows.
class Host {
 public:
  static constexpr int64_t kCapacity = 4;

  explicit Host(const Sizes& sizes) : sizes_(sizes), graphs_(4), weights_(kCapacity) {
    for (const int64_t bucket : kBuckets) {
      Sizes of_bucket = sizes;
      of_bucket.rows = bucket;
      of_bucket.slots = kCapacity;
      ticks_.push_back(std::make_unique<Ticks>(of_bucket, stream_));
    }
    weights_.write(std::vector<float>(kCapacity, 0.75f), stream_);
    const sidestep_scheduler_options options{kCapacity, 16, kBuckets, 2};
    succeed(sidestep_scheduler_create(&options, &scheduler_));
  }
  Host(const Host&) = delete;
  ~Host() { sidestep_scheduler_destroy(scheduler_); }

  void submit(int64_t steps) {
    const sidestep_scheduler_request request{1, steps, 1, 0};
    int64_t id = -1;
    succeed(sidestep_scheduler_submit(scheduler_, &request, &id));
    lengths_.push_back(steps);
    results_.emplace_back();
  }

  // Until nothing needs the model.
  void run() {
    for (;;) {
      admit();
      sidestep_row rows[kCapacity];
      sidestep_entry entries[kCapacity];
      sidestep_batch batch{rows, entries, 0, 0, 0, 0};
      succeed(sidestep_scheduler_next(scheduler_, &batch));
      if (batch.size == 0) return;
      take(batch);
    }
  }

  const std::vector<float>& result(size_t id) const { return results_[id]; }
  const Graphs& graphs() const { return graphs_; }
  int64_t length(size_t id) const { return lengths_[id]; }

 private:
  static constexpr int64_t kBuckets[] = {2, 4};

  size_t state() const { return static_cast<size_t>(sizes_.registers * sizes_.dim); }
  // Registers are those of the first bucket, for all of them.
  const Array<float>& registers() const { return ticks_[0]->registers; }

  void admit() {
    sidestep_row rows[kCapacity];
    int64_t count = 0;
    succeed(sidestep_scheduler_admit(scheduler_, rows, &count));
    for (int64_t i = 0; i < count; ++i) {
      const auto seed = static_cast<uint32_t>(rows[i].request + 20);
      registers().write(numbers(state(), seed), stream_, rows[i].slot * state());
    }
  }

  void take(const sidestep_batch& batch) {
    Ticks& ticks = *ticks_[batch.size == kBuckets[0] ? 0 : 1];
    std::vector<int64_t> steps(batch.size, -1);  // nobody there
    std::vector<int64_t> slots(batch.size, -1);
    std::vector<int64_t> of_rows;
    for (int64_t i = 0; i < batch.num_rows; ++i) {
      steps[i] = batch.rows[i].step;
      slots[i] = batch.rows[i].slot;
      of_rows.push_back(batch.rows[i].slot);
    }
    ticks.step.write(steps, stream_);
    ticks.slot.write(slots, stream_);
    sidestep_tick tick = ticks.tick();
    tick.args.registers = registers().data();
    tick.args.noise = nullptr;
    tick.args.weights = weights_.data();
    succeed(graphs_.run(tick, stream_));
    sidestep_row rows[kCapacity];
    int64_t count = 0;
    succeed(sidestep_scheduler_complete(scheduler_, batch.ticket, rows, &count));
    const std::vector<uint8_t> compute(of_rows.size(), 1);
    std::vector<int32_t> states(of_rows.size());
    succeed(sidestep_scheduler_advance(scheduler_, of_rows.data(), compute.data(),
                                       static_cast<int64_t>(of_rows.size()), states.data()));
    const std::vector<float> all = registers().read(stream_);
    for (size_t i = 0; i < states.size(); ++i) {
      if (states[i] != SIDESTEP_ROW_LAST) continue;
      const auto begin = all.begin() + static_cast<int64_t>(of_rows[i] * state());
      results_[rows[i].request].assign(begin, begin + static_cast<int64_t>(state()));
    }
  }

  const Sizes sizes_;
  const Stream stream_;
  const Graphs graphs_;
  const Array<float> weights_;
  std::vector<std::unique_ptr<Ticks>> ticks_;  // of each bucket
  sidestep_scheduler* scheduler_ = nullptr;
  std::vector<int64_t> lengths_;
  std::vector<std::vector<float>> results_;
};

void rows() {
  Sizes sizes;
  sizes.branches = 1;
  Host host(sizes);
  for (const int64_t steps : {3, 7, 5, 4, 6, 2, 9}) host.submit(steps);
  host.run();
  const Stream stream;
  for (size_t id = 0; id < 7; ++id) {
    const auto seed = static_cast<uint32_t>(id + 20);
    expect(same_bits(host.result(id), alone(sizes, seed, host.length(id), stream)),
           "request " + std::to_string(id) + " is as it is alone");
  }
  const sidestep_graphs_counts counts = host.graphs().counts();
  expect(counts.kept == 2 && counts.captured == 2 && counts.enqueued == 2 && counts.replayed > 4,
         "a graph for each bucket");
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
