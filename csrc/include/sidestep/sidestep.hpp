// The engine for C++17: owners for the handles of the C API, exceptions for its statuses, and no
// more than that. plan.h and engine.h say what everything means.
#ifndef SIDESTEP_SIDESTEP_HPP_
#define SIDESTEP_SIDESTEP_HPP_

#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "sidestep/engine.h"

namespace sidestep {
inline namespace api {

// A status that is not SIDESTEP_OK, with its sentence.
class Error : public std::runtime_error {
 public:
  explicit Error(sidestep_status status) : std::runtime_error(sidestep_error()), status_(status) {}
  sidestep_status status() const { return status_; }

 private:
  sidestep_status status_;
};

inline void check(sidestep_status status) {
  if (status != SIDESTEP_OK) throw Error(status);
}

// The header of a program and the library that it found must agree.
inline void check_version() {
  if (sidestep_abi_version() == SIDESTEP_ABI_VERSION) return;
  throw std::runtime_error("sidestep: the library has ABI " +
                           std::to_string(sidestep_abi_version()) + ", the program was built for " +
                           std::to_string(SIDESTEP_ABI_VERSION));
}

class Plan {
 public:
  static Plan load(const std::string& path) {
    sidestep_plan* plan = nullptr;
    check(sidestep_plan_load(path.c_str(), &plan));
    return Plan(plan);
  }
  static Plan read(const void* data, int64_t size) {
    sidestep_plan* plan = nullptr;
    check(sidestep_plan_read(data, size, &plan));
    return Plan(plan);
  }

  // The texts live as long as the plan.
  sidestep_plan_info info() const {
    sidestep_plan_info info;
    check(sidestep_plan_describe(handle_.get(), &info));
    return info;
  }
  const sidestep_plan* get() const { return handle_.get(); }

 private:
  struct Destroy {
    void operator()(sidestep_plan* plan) const { sidestep_plan_destroy(plan); }
  };
  explicit Plan(sidestep_plan* plan) : handle_(plan) {}
  std::unique_ptr<sidestep_plan, Destroy> handle_;
};

struct Options {
  int64_t dim = 0;  // D: elements of one latent
  int64_t capacity = 32;
  int64_t queue = 1024;
  std::vector<int64_t> buckets = {1, 2, 4, 8, 16, 32};
  int64_t table_steps = 16384;
  int32_t num_registers = 4;
  int32_t num_branches = 2;
  sidestep_dtype dtype = SIDESTEP_FLOAT32;
  sidestep_device device = SIDESTEP_CPU;
  bool skips = false;
  void* memory = nullptr;
  int64_t memory_bytes = 0;

  // Valid while this is and stays as it is.
  sidestep_engine_options get() const {
    return {dim,
            capacity,
            queue,
            buckets.data(),
            static_cast<int64_t>(buckets.size()),
            table_steps,
            num_registers,
            num_branches,
            dtype,
            device,
            skips ? 1 : 0,
            memory,
            memory_bytes};
  }
};

// A model call that is out: complete or fail it.
struct Call {
  std::vector<sidestep_call_entry> entries;  // [size], those from num_entries on are padding
  int64_t num_entries = 0;
  int64_t ticket = -1;

  int64_t size() const { return static_cast<int64_t>(entries.size()); }
};

class Engine {
 public:
  explicit Engine(const Options& options)
      : largest_(options.buckets.empty() ? 0 : options.buckets.back()) {
    check_version();
    sidestep_engine* engine = nullptr;
    const sidestep_engine_options given = options.get();
    check(sidestep_engine_create(&given, &engine));
    handle_.reset(engine);
  }

  // Its guidance may be let go of afterwards, its latents and noise when it has ended.
  int64_t submit(const sidestep_request& request) {
    int64_t id = -1;
    check(sidestep_engine_submit(handle_.get(), &request, &id));
    return id;
  }

  // x, t: [largest bucket, ...] in the engine's memory. Nothing where nothing needs the model now.
  std::optional<Call> next(void* x, float* t, void* stream = nullptr) {
    Call call;
    call.entries.resize(static_cast<size_t>(largest_));
    sidestep_call given{x, t, call.entries.data(), largest_, 0, 0, -1};
    check(sidestep_engine_next(handle_.get(), &given, stream));
    if (given.size == 0) return std::nullopt;
    call.entries.resize(static_cast<size_t>(given.size));
    call.num_entries = given.num_entries;
    call.ticket = given.ticket;
    return call;
  }

  void complete(const Call& call, const void* outputs, void* stream = nullptr) {
    check(sidestep_engine_complete(handle_.get(), call.ticket, outputs, call.size(), stream));
  }

  void fail(const Call& call, const std::string& reason) {
    check(sidestep_engine_fail(handle_.get(), call.ticket, reason.c_str()));
  }

  // Whether it had not ended before.
  bool cancel(int64_t id) {
    int32_t ended = 0;
    check(sidestep_engine_cancel(handle_.get(), id, &ended));
    return ended != 0;
  }

  std::optional<sidestep_result> result() {
    sidestep_result result;
    int32_t any = 0;
    check(sidestep_engine_result(handle_.get(), &result, &any));
    return any != 0 ? std::optional<sidestep_result>(result) : std::nullopt;
  }

  sidestep_scheduler_counts counts() {
    sidestep_scheduler_counts counts;
    check(sidestep_engine_count(handle_.get(), &counts));
    return counts;
  }

  // One call of model(const Call&), which reads x and t and writes the outputs [size, D]. What it
  // throws ends the requests in that call, and no other; so does a call that cannot be completed.
  // An exception that is no std::exception goes on to the caller. False when nothing needs the
  // model now.
  template <typename Model>
  bool tick(void* x, float* t, const void* outputs, Model&& model, void* stream = nullptr) {
    const std::optional<Call> call = next(x, t, stream);
    if (!call) return false;
    try {
      model(*call);
    } catch (const std::exception& error) {
      fail(*call, error.what());
      return true;
    } catch (...) {
      fail(*call, "the model threw what is no std::exception");
      throw;
    }
    try {
      complete(*call, outputs, stream);
    } catch (const Error& error) {
      fail(*call, error.what());
      throw;
    }
    return true;
  }

  sidestep_engine* get() const { return handle_.get(); }

 private:
  struct Destroy {
    void operator()(sidestep_engine* engine) const { sidestep_engine_destroy(engine); }
  };
  int64_t largest_;
  std::unique_ptr<sidestep_engine, Destroy> handle_;
};

}  // namespace api
}  // namespace sidestep

#endif  // SIDESTEP_SIDESTEP_HPP_
