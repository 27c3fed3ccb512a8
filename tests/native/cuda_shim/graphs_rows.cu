// The graph executor under the row scheduler: a host's loop in C++.
#include <memory>

#include "graphs.cuh"
#include "sidestep/scheduler.h"

namespace {

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

}  // namespace

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
