// Runs the dependency schedule tick by tick, for planning: see parareal.h.
#include <algorithm>
#include <cinttypes>
#include <queue>
#include <tuple>

#include "core/parareal.h"

namespace sidestep {
namespace {

// A few seconds, and 512 MiB.
constexpr int64_t kMostEvaluations = int64_t{1} << 24;

// The longest run of evaluations that depend on each other, from one to the end of all.
class CriticalPath {
 public:
  explicit CriticalPath(const PararealSchedule& schedule)
      : schedule_(schedule),
        iterates_(schedule.iterations() + 1),
        first_((schedule.blocks() + 2) * (iterates_ + 1), 0) {
    for (int64_t i = schedule.blocks(); i >= 1; --i) {
      for (int64_t q = std::min(i, iterates_) - 1; q >= 0; --q) {
        const int64_t fine = q + 1 < iterates_ ? schedule.steps(i) - 1 + first(i + 1, q + 1) : 0;
        first_[at(i, q)] = 1 + std::max(first(i + 1, q), fine);
      }
    }
  }

  // From evaluation `taken` (0 is the first) of chain (i, q), itself included.
  int64_t operator()(int64_t i, int64_t q, int64_t taken) const {
    if (taken == 0) return first(i, q);
    return schedule_.steps(i) - taken + first(i + 1, q + 1);
  }

 private:
  int64_t at(int64_t i, int64_t q) const { return i * (iterates_ + 1) + q; }
  int64_t first(int64_t i, int64_t q) const { return first_[at(i, q)]; }

  const PararealSchedule& schedule_;
  int64_t iterates_;            // K + 1
  std::vector<int64_t> first_;  // [B + 2, K + 2], 0 behind the last block
};

struct Ready {
  int64_t path;
  int64_t block;
  int64_t iterate;
  int64_t taken;  // evaluations of the chain before this one

  // The one that is most urgent is the greatest; then it is the earliest iterate, the first block.
  bool operator<(const Ready& other) const {
    return std::make_tuple(path, -iterate, -block) <
           std::make_tuple(other.path, -other.iterate, -other.block);
  }
};

class Simulation {
 public:
  Simulation(const sidestep_parareal_options& options, Wavefront* wavefront)
      : schedule_(options), path_(schedule_), wavefront_(*wavefront) {
    wavefront_.formed.assign(options.iterations + 1, 0);
    sidestep_chain chain{};
    schedule_.begin(&chain);
    push(chain.block, chain.iterate, 0);
  }

  void run(int64_t width) {
    while (!ready_.empty()) {
      const int64_t tick = wavefront_.ticks++;
      tick_.clear();
      while (!ready_.empty() && (width == 0 || static_cast<int64_t>(tick_.size()) < width)) {
        tick_.push_back(ready_.top());
        ready_.pop();
      }
      for (const Ready& one : tick_) {
        sidestep_chain chain{};
        schedule_.chain(one.block, one.iterate, &chain);
        wavefront_.evaluations.push_back({tick, one.block, one.iterate, chain.first + one.taken});
        evaluated(one, chain.evaluations);
      }
    }
  }

 private:
  void push(int64_t block, int64_t iterate, int64_t taken) {
    ready_.push({path_(block, iterate, taken), block, iterate, taken});
  }

  void evaluated(const Ready& one, int64_t evaluations) {
    const std::vector<sidestep_boundary>* formed = nullptr;
    if (one.taken == 0) {
      schedule_.coarse(one.block, one.iterate, &formed);
      start(*formed);
    }
    if (one.taken + 1 < evaluations) return push(one.block, one.iterate, one.taken + 1);
    schedule_.ended(one.block, one.iterate, &formed);
    start(*formed);
  }

  void start(const std::vector<sidestep_boundary>& formed) {
    for (const sidestep_boundary& boundary : formed) {
      if (boundary.chain.evaluations > 0) push(boundary.chain.block, boundary.chain.iterate, 0);
      if (boundary.block == schedule_.blocks()) {
        wavefront_.formed[boundary.iterate] = wavefront_.ticks;
      }
    }
  }

  PararealSchedule schedule_;
  CriticalPath path_;
  Wavefront& wavefront_;
  std::priority_queue<Ready> ready_;
  std::vector<Ready> tick_;
};

}  // namespace

int64_t parareal_cost(const sidestep_parareal_options& options) {
  int64_t evaluations = 0;
  for (int64_t i = 1; i <= options.blocks; ++i) {
    const int64_t whole = std::min(i, options.iterations);  // chains of all steps
    evaluations += whole * (options.bounds[i] - options.bounds[i - 1]);
    evaluations += i > options.iterations ? 1 : 0;
  }
  return evaluations;
}

Status simulate_parareal(const sidestep_parareal_options& options, int64_t width,
                         Wavefront* wavefront) {
  const Status status = PararealSchedule::check(options);
  if (!status.ok()) return status;
  if (width < 0) {
    return invalid_argument("parareal: a width of %" PRId64 ", expected 0 or more", width);
  }
  const int64_t evaluations = parareal_cost(options);
  if (evaluations > kMostEvaluations) {
    return invalid_argument("parareal: a simulation of %" PRId64
                            " evaluations, expected at most %" PRId64,
                            evaluations, kMostEvaluations);
  }
  *wavefront = Wavefront();
  wavefront->evaluations.reserve(evaluations);
  Simulation(options, wavefront).run(width);
  return Status();
}

}  // namespace sidestep
