// sidestep.hpp: whatever a model throws, and whatever the engine refuses, leaves the engine usable.
#include <cstring>
#include <string>

#include "expect.h"
#include "sidestep/sidestep.hpp"

namespace {

constexpr int64_t kDim = 5;

struct Host {
  sidestep::Plan plan = sidestep::Plan::load(SIDESTEP_TEST_PLAN);
  sidestep::Options options;
  std::vector<float> x = std::vector<float>(2 * kDim), t = std::vector<float>(2);
  std::vector<float> latents = std::vector<float>(kDim, 1.0f);

  Host() {
    options.dim = kDim;
    options.capacity = 1;
    options.buckets = {1, 2};
  }

  void submit(sidestep::Engine* engine) {
    const float weight = 1.0f;
    sidestep_request request{};
    request.plan = plan.get();
    request.latents = latents.data();
    request.guidance = &weight;
    request.guidance_steps = request.rows = request.branches = 1;
    request.dim = kDim;
    engine->submit(request);
  }

  // The outputs are x itself.
  bool tick(sidestep::Engine* engine) {
    return engine->tick(x.data(), t.data(), x.data(), [](const sidestep::Call&) {});
  }
};

// The request that failed, and then another one that the only slot is free for.
void check_goes_on(Host* host, sidestep::Engine* engine, const char* why) {
  const auto failed = engine->result();
  expect(failed && failed->outcome == SIDESTEP_REQUEST_FAILED, "the request fails");
  expect(failed && std::strcmp(failed->error, why) == 0, "and says why");
  host->submit(engine);
  int calls = 0;
  while (host->tick(engine)) ++calls;
  expect(calls == 8, "the next one is sampled");
  const auto done = engine->result();
  expect(done && done->outcome == SIDESTEP_REQUEST_DONE, "to its end");
}

void test_a_model_that_throws() {
  Host host;
  sidestep::Engine engine(host.options);
  host.submit(&engine);
  const auto throws = [](const sidestep::Call&) { throw std::runtime_error("no memory left"); };
  expect(engine.tick(host.x.data(), host.t.data(), host.x.data(), throws), "tick goes on");
  check_goes_on(&host, &engine, "no memory left");
}

void test_a_model_that_throws_a_number() {
  Host host;
  sidestep::Engine engine(host.options);
  host.submit(&engine);
  int caught = 0;
  try {
    engine.tick(host.x.data(), host.t.data(), host.x.data(),
                [](const sidestep::Call&) { throw 7; });
  } catch (int number) {
    caught = number;
  }
  expect(caught == 7, "the number arrives");
  check_goes_on(&host, &engine, "the model threw what is no std::exception");
}

void test_outputs_that_are_refused() {
  Host host;
  sidestep::Engine engine(host.options);
  host.submit(&engine);
  std::string why;
  try {
    engine.tick(host.x.data(), host.t.data(), nullptr, [](const sidestep::Call&) {});
  } catch (const sidestep::Error& error) {
    expect(error.status() == SIDESTEP_INVALID_ARGUMENT, "an invalid argument");
    why = error.what();
  }
  expect(why.find("expected those of the call's 1") != std::string::npos, "null is refused");
  check_goes_on(&host, &engine, why.c_str());
}

void test_an_engine_without_buckets() {
  Host host;
  host.options.buckets = std::vector<int64_t>();
  std::string why;
  try {
    sidestep::Engine engine(host.options);
  } catch (const sidestep::Error& error) {
    why = error.what();
  }
  expect(why.find("num_buckets is 0") != std::string::npos, "no buckets are refused");
}

}  // namespace

int main() {
  test_a_model_that_throws();
  test_a_model_that_throws_a_number();
  test_outputs_that_are_refused();
  test_an_engine_without_buckets();
  return g_failures == 0 ? 0 : 1;
}
