// The dependency schedule of one trajectory: see parareal.h.
#include "core/parareal.h"

#include <algorithm>
#include <cinttypes>

namespace sidestep {

Status PararealSchedule::check(const sidestep_parareal_options& options) {
  if (options.blocks < 1 || options.blocks > SIDESTEP_MAX_BLOCKS) {
    return invalid_argument("parareal: %" PRId64 " blocks, expected 1 to %d", options.blocks,
                            SIDESTEP_MAX_BLOCKS);
  }
  if (options.bounds == nullptr) {
    return invalid_argument("parareal: bounds is null, expected an address");
  }
  for (int64_t i = 0; i <= options.blocks; ++i) {
    const int64_t least = i == 0 ? 0 : options.bounds[i - 1] + 1;
    // A trajectory of more steps than this is a mistake, and its sums could overflow.
    constexpr int64_t kMost = int64_t{1} << 40;
    if (options.bounds[i] < least || options.bounds[i] > kMost) {
      return invalid_argument("parareal: bounds[%" PRId64 "] is %" PRId64 ", expected %" PRId64
                              " to %" PRId64,
                              i, options.bounds[i], least, kMost);
    }
  }
  if (options.iterations < 0 || options.iterations > options.blocks) {
    return invalid_argument("parareal: %" PRId64
                            " iterations, expected 0 to the number of blocks, %" PRId64,
                            options.iterations, options.blocks);
  }
  return Status();
}

PararealSchedule::PararealSchedule(const sidestep_parareal_options& options)
    : bounds_(options.bounds, options.bounds + options.blocks + 1),
      created_(options.iterations),
      iterations_(options.iterations),
      states_(options.blocks * (options.iterations + 1), State::kNotStarted),
      next_(options.blocks + 1, 0) {
  formed_.reserve(options.iterations + 1);
}

Status PararealSchedule::begin(sidestep_chain* chain) {
  if (state(1, 0) != State::kNotStarted) {
    return invalid_argument("parareal: begin twice, expected once");
  }
  state(1, 0) = State::kStarted;
  *chain = describe(1, 0);
  return Status();
}

Status PararealSchedule::coarse(int64_t block, int64_t iterate,
                                const std::vector<sidestep_boundary>** formed) {
  const Status status = check_started("the first evaluation", block, iterate);
  if (!status.ok()) return status;
  if (state(block, iterate) != State::kStarted) {
    return invalid_argument("parareal: the first evaluation of chain (%" PRId64 ", %" PRId64
                            ") twice, expected once",
                            block, iterate);
  }
  state(block, iterate) = State::kCoarse;
  *formed = &form(block);
  return Status();
}

Status PararealSchedule::ended(int64_t block, int64_t iterate,
                               const std::vector<sidestep_boundary>** formed) {
  const Status status = check_started("the end", block, iterate);
  if (!status.ok()) return status;
  if (state(block, iterate) == State::kStarted) {
    return invalid_argument("parareal: the end of chain (%" PRId64 ", %" PRId64
                            "), expected its first evaluation before",
                            block, iterate);
  }
  if (state(block, iterate) == State::kEnded) {
    return invalid_argument("parareal: the end of chain (%" PRId64 ", %" PRId64
                            ") twice, expected once",
                            block, iterate);
  }
  state(block, iterate) = State::kEnded;
  *formed = &form(block);
  return Status();
}

Status PararealSchedule::limit(int64_t iterations) {
  if (iterations < 0 || iterations > iterations_) {
    return invalid_argument("parareal: a limit of %" PRId64 " iterations, expected 0 to %" PRId64,
                            iterations, iterations_);
  }
  iterations_ = iterations;
  return Status();
}

Status PararealSchedule::chain(int64_t block, int64_t iterate, sidestep_chain* chain) const {
  if (!exists(block, iterate)) {
    return invalid_argument("parareal: chain (%" PRId64 ", %" PRId64
                            "), expected a block of 1 to %" PRId64
                            ", and an iterate of 0 to %" PRId64 " and below the block",
                            block, iterate, blocks(), created_);
  }
  *chain = describe(block, iterate);
  return Status();
}

bool PararealSchedule::exists(int64_t block, int64_t iterate) const {
  return block >= 1 && block <= blocks() && iterate >= 0 && iterate < block && iterate <= created_;
}

PararealSchedule::State& PararealSchedule::state(int64_t block, int64_t iterate) {
  return states_[(block - 1) * (created_ + 1) + iterate];
}

sidestep_chain PararealSchedule::describe(int64_t block, int64_t iterate) const {
  int64_t evaluations = 0;
  if (iterate < iterations_) evaluations = steps(block);
  if (iterate == iterations_) evaluations = 1;
  return {block, iterate, bounds_[block - 1], evaluations};
}

Status PararealSchedule::check_started(const char* what, int64_t block, int64_t iterate) {
  if (exists(block, iterate) && state(block, iterate) != State::kNotStarted) return Status();
  return invalid_argument("parareal: %s of chain (%" PRId64 ", %" PRId64
                          "), expected a chain that has started",
                          what, block, iterate);
}

// The equations of sidestep/parareal.h. x_{i-1}^p is there when chain (i, p) has started.
bool PararealSchedule::can_form(int64_t block, int64_t iterate) {
  if (iterate > std::min(block, iterations_)) return false;
  const bool fine = iterate == 0 || state(block, iterate - 1) == State::kEnded;
  if (!fine || iterate == block) return fine;
  return state(block, iterate) >= State::kCoarse;
}

const std::vector<sidestep_boundary>& PararealSchedule::form(int64_t block) {
  formed_.clear();
  for (; can_form(block, next_[block]); ++next_[block]) {
    const int64_t iterate = next_[block];
    sidestep_boundary boundary{block, iterate, iterate == block, {block + 1, iterate, 0, 0}};
    if (block < blocks()) {
      state(block + 1, iterate) = State::kStarted;
      boundary.chain = describe(block + 1, iterate);
    }
    formed_.push_back(boundary);
  }
  return formed_;
}

}  // namespace sidestep
