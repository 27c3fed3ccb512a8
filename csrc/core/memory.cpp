// Host memory: see memory.h.
#include "core/memory.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>

#include "kernels/launch.h"

namespace sidestep {
namespace {

class HostMemory : public Memory {
 public:
  ~HostMemory() override {
    for (const auto& [block, origin] : origins_) std::free(origin);
  }

  // Untouched pages of calloc cost nothing, so that a large engine costs what it uses.
  Status allocate(int64_t bytes, void** block) override {
    void* origin = std::calloc(static_cast<size_t>(bytes + kAlignment), 1);
    if (origin == nullptr) {
      return Status(SIDESTEP_FAILED,
                    "engine: out of memory, " + std::to_string(bytes) + " bytes were asked for");
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(origin) + kAlignment - 1;
    *block = reinterpret_cast<void*>(address / kAlignment * kAlignment);
    origins_[*block] = origin;
    return Status();
  }

  void release(void* block) override {
    const auto found = origins_.find(block);
    if (found == origins_.end()) return;
    std::free(found->second);
    origins_.erase(found);
  }

  void use(void*) override {}

  Status clear(void* to, int64_t bytes) override {
    std::memset(to, 0, static_cast<size_t>(bytes));
    return Status();
  }

  Status copy(void* to, const void* from, int64_t bytes) override {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return Status();
  }

  Status upload(void* to, const void* host, int64_t bytes) override {
    return copy(to, host, bytes);
  }

  Status download(void* host, const void* from, int64_t bytes) override {
    return copy(host, from, bytes);
  }

  Status step(const sidestep_solver_step_args& args, void*) override {
    return cpu_solver_step(args);
  }

 private:
  std::map<void*, void*> origins_;  // by block: what calloc returned
};

}  // namespace

std::unique_ptr<Memory> host_memory() { return std::make_unique<HostMemory>(); }

}  // namespace sidestep
