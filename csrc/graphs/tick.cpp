// Puts ticks on streams.
#include "graphs/tick.h"

#include <cinttypes>
#include <exception>

#include "kernels/launch.h"

namespace sidestep {
namespace {

// The arguments of step j.
sidestep_solver_step_args step_args(const sidestep_tick& tick, int64_t j) {
  sidestep_solver_step_args args = tick.args;
  args.weights += j * args.rows * args.num_branches;
  if (args.noise != nullptr) args.noise += j * args.rows * args.dim;
  args.step += j * args.rows;
  args.stats += j * args.rows * 2;
  return args;
}

// The fused step on lines that change nothing: the rows' latents, scaled and cast.
sidestep_solver_step_args read_args(const sidestep_tick& tick) {
  sidestep_solver_step_args args = tick.args;
  args.table = tick.read_table;
  args.noise = nullptr;
  return args;
}

Status call_model(const sidestep_tick& tick, int64_t j, void* stream) {
  try {
    const int32_t code = tick.model(tick.context, j, stream);
    if (code == 0) return Status();
    return Status(SIDESTEP_FAILED, "the callback returned " + std::to_string(code));
  } catch (const std::exception& error) {
    return Status(SIDESTEP_FAILED, std::string("the callback threw: ") + error.what());
  } catch (...) {
    return Status(SIDESTEP_FAILED, "the callback threw");
  }
}

class Described : public StageObserver {
 public:
  Status passed(const Stage& stage, const Status& status) override {
    if (status.ok()) return status;
    return Status(status.code(), "tick: " + stage.text() + " failed: " + status.message());
  }
};

Status check_numbers(const sidestep_tick& tick) {
  if (tick.chain < 1) {
    return invalid_argument("tick: chain is %" PRId64 ", expected at least 1", tick.chain);
  }
  if (tick.model == nullptr) return invalid_argument("tick: model is null, expected a function");
  if (tick.read_table != nullptr && tick.args.model_input == nullptr) {
    return invalid_argument("tick: model_input is null, expected an address beside read_table");
  }
  if (tick.num_tensors < 0 || (tick.num_tensors > 0 && tick.tensors == nullptr)) {
    return invalid_argument("tick: tensors is %p with num_tensors = %" PRId64
                            ", expected that many",
                            static_cast<const void*>(tick.tensors), tick.num_tensors);
  }
  for (int64_t i = 0; i < tick.num_tensors; ++i) {
    const int32_t dims = tick.tensors[i].num_dims;
    if (dims < 0 || dims > SIDESTEP_MAX_DIMS) {
      return invalid_argument("tick: tensors[%" PRId64 "] has %d dimensions, expected 0 to %d", i,
                              dims, SIDESTEP_MAX_DIMS);
    }
  }
  return Status();
}

}  // namespace

Status check_tick(const sidestep_tick& tick) {
  const Status numbers = check_numbers(tick);
  if (!numbers.ok()) return numbers;
  for (int64_t j = 0; j < tick.chain; ++j) {
    const Status step = check_solver_step(step_args(tick, j));
    if (!step.ok()) return step;
  }
  return tick.read_table == nullptr ? Status() : check_solver_step(read_args(tick));
}

Status enqueue_stages(const sidestep_tick& tick, void* stream, StageObserver& observer) {
  if (tick.read_table != nullptr) {
    const Status read = cuda_solver_step(read_args(tick), tick.workspace, stream);
    const Status status = observer.passed({"the read of the inputs", 0}, read);
    if (!status.ok()) return status;
  }
  for (int64_t j = 0; j < tick.chain; ++j) {
    Status status = observer.passed({"the model call", j}, call_model(tick, j, stream));
    if (!status.ok()) return status;
    const Status step = cuda_solver_step(step_args(tick, j), tick.workspace, stream);
    status = observer.passed({"solver_step", j}, step);
    if (!status.ok()) return status;
  }
  return Status();
}

Status enqueue_tick(const sidestep_tick& tick, void* stream) {
  const Status status = check_tick(tick);
  if (!status.ok()) return status;
  Described described;
  return enqueue_stages(tick, stream, described);
}

}  // namespace sidestep
