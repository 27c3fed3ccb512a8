// The engine of the C API on the CPU and on the stand-in for CUDA: the same requests, the same
// bits.
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda_runtime.h"
#include "sidestep/sidestep.hpp"

namespace {

constexpr int64_t kDim = 2051;  // one chunk of the kernel and three elements
constexpr int kRequests = 7;
using Latents = std::vector<std::vector<float>>;

sidestep::Options options(sidestep_device device) {
  sidestep::Options options;
  options.dim = kDim;
  options.capacity = 4;
  options.buckets = {2, 5};
  options.num_registers = 3;
  options.table_steps = 64;
  options.skips = true;
  options.device = device;
  return options;
}

Latents noise() {
  Latents latents(kRequests, std::vector<float>(2 * kDim));
  uint32_t state = 1;
  for (auto& latent : latents) {
    for (float& value : latent) {
      state = state * 1664525u + 1013904223u;
      value = static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
    }
  }
  return latents;
}

// Requests with one and two rows and branches, some of which skip; returns their results.
Latents sampled(const sidestep::Plan& plan, sidestep_device device, cudaStream_t stream) {
  sidestep::Engine engine(options(device));
  Latents latents = noise();
  const float guidance[] = {-1.5f, 2.5f};
  for (int i = 0; i < kRequests; ++i) {
    sidestep_request request{};
    request.plan = plan.get();
    request.latents = latents[i].data();
    request.guidance = guidance;
    request.guidance_steps = 1;
    request.rows = 1 + i % 2;
    request.dim = kDim;
    request.branches = 1 + i / 2 % 2;
    request.max_skip = i % 3 == 0 ? 2 : 0;
    request.skip_threshold = 0.5f;
    engine.submit(request);
  }
  std::vector<float> x(5 * kDim), t(5), u(5 * kDim);
  const auto model = [&](const sidestep::Call& call) {
    for (int64_t k = 0; k < call.size() * kDim; ++k) {
      u[k] =
          0.25f * x[k] + 0.001f * t[k / kDim] + static_cast<float>(call.entries[k / kDim].branch);
    }
  };
  int calls = 0;
  while (engine.tick(x.data(), t.data(), u.data(), model, stream)) ++calls;
  int64_t evaluations = 0;
  while (const auto result = engine.result()) {
    sidestep::check(result->outcome == SIDESTEP_REQUEST_DONE ? SIDESTEP_OK : SIDESTEP_FAILED);
    evaluations += result->evaluations;
  }
  std::printf("%d calls, %d evaluations\n", calls, static_cast<int>(evaluations));
  return latents;
}

}  // namespace

int main(int, char** argv) {
  const sidestep::Plan plan = sidestep::Plan::load(argv[1]);
  cudaStream_t stream = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  const Latents on_cpu = sampled(plan, SIDESTEP_CPU, nullptr);
  const bool same = sampled(plan, SIDESTEP_CUDA, stream) == on_cpu;
  cudaStreamDestroy(stream);
  std::printf(same && on_cpu != noise() ? "the same bits\n" : "other bits\n");
  return same ? 0 : 1;
}
