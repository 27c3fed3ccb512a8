// A server of pictures that embeds sidestep: requests come in as lines, share model calls, and go
// out as they end.
//
//     server [--onnx LIBRARY MODEL] [--skip THRESHOLD MAX] < requests
//
// A request is one line:  NAME PLAN NOISE TEXT SCALE OUT
//
//     PLAN   a file of Python's Plan.save: the sampler, its steps and its times
//     NOISE  a file of fp32 numbers, unit noise of one latent; or seed:NUMBER
//     TEXT   a file of fp32 numbers, [unconditional; conditional] prompt embeddings; or -
//     SCALE  of the guidance
//     OUT    the file of fp32 numbers that the latent goes to
//
// and is answered by one line: "NAME done: C model calls" or "NAME failed: why". A request joins at
// the next call, whatever the others are doing. Without --onnx the model is a formula.
#include <condition_variable>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <mutex>
#include <random>
#include <sidestep/sidestep.hpp>
#include <sstream>
#include <thread>

#include "model.h"

namespace {

// One request, from its line to its answer. The engine reads and writes its arrays meanwhile.
struct Job {
  std::string name, out;
  std::vector<float> latent, text, guidance;
};

std::vector<float> read_numbers(const std::string& path, int64_t count) {
  std::vector<float> numbers(count);
  const auto bytes = static_cast<std::streamsize>(count * sizeof(float));
  std::ifstream file(path, std::ios::binary);
  if (!file.read(reinterpret_cast<char*>(numbers.data()), bytes) || file.get() != EOF) {
    throw std::runtime_error(path + " does not hold " + std::to_string(count) + " numbers");
  }
  return numbers;
}

bool write_numbers(const std::string& path, const std::vector<float>& numbers) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(numbers.data()),
             static_cast<std::streamsize>(numbers.size() * sizeof(float)));
  file.close();
  return file.good();
}

std::vector<float> read_noise(const std::string& from, int64_t dim) {
  if (from.rfind("seed:", 0) != 0) return read_numbers(from, dim);
  std::mt19937 generator(static_cast<unsigned>(std::stoul(from.substr(5))));
  std::normal_distribution<float> normal;
  std::vector<float> noise(dim);
  for (float& value : noise) value = normal(generator);
  return noise;
}

class Server {
 public:
  Server(const Shape& shape, std::unique_ptr<Model> model, float threshold, int max_skip)
      : shape_(shape),
        model_(std::move(model)),
        threshold_(threshold),
        max_skip_(max_skip),
        engine_(options(shape, max_skip)) {
    const int64_t room = options(shape, max_skip).buckets.back();
    x_.resize(room * shape.dim());
    u_.resize(room * shape.dim());
    t_.resize(room);
    text_.resize(room * shape.text_size());
  }

  // The front end, in a thread of its own: the engine may be given requests at any time.
  void read(std::istream& lines) {
    for (std::string line; std::getline(lines, line);) {
      if (!line.empty()) accept(line);
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    changed_.notify_one();
  }

  // The back end: one model call after another, each for as many requests as fit.
  void serve() {
    const auto model = [this](const sidestep::Call& call) { evaluate(call); };
    for (;;) {
      const bool called = engine_.tick(x_.data(), t_.data(), u_.data(), model);
      while (const auto result = engine_.result()) answer(*result);
      if (called) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      const auto busy = [this] { return accepted_ > answered_; };
      changed_.wait(lock, [&] { return busy() || closed_; });
      if (closed_ && !busy()) return;
    }
  }

 private:
  static sidestep::Options options(const Shape& shape, int max_skip) {
    sidestep::Options options;
    options.dim = shape.dim();
    options.capacity = 16;
    options.skips = max_skip > 0;
    return options;
  }

  void accept(const std::string& line) {
    auto job = std::make_unique<Job>();
    std::istringstream words(line);
    std::string plan, noise, text;
    float scale = 1.0f;
    words >> job->name >> plan >> noise >> text >> scale >> job->out;
    try {
      if (!words) throw std::runtime_error("expected NAME PLAN NOISE TEXT SCALE OUT");
      if (plans_.count(plan) == 0) plans_.emplace(plan, sidestep::Plan::load(plan));
      const sidestep::Plan& sampler = plans_.at(plan);
      job->latent = read_noise(noise, shape_.dim());
      for (float& value : job->latent) value *= static_cast<float>(sampler.info().initial_scale);
      job->text.assign(2 * shape_.text_size(), 0.0f);
      if (text != "-") job->text = read_numbers(text, 2 * shape_.text_size());
      job->guidance = {1 - scale, scale};
      submit(sampler, job.get());
      job.release();  // until its answer
    } catch (const std::exception& error) {
      say(job->name, std::string("failed: ") + error.what());
    }
  }

  void submit(const sidestep::Plan& plan, Job* job) {
    sidestep_request request{};
    request.plan = plan.get();
    request.latents = job->latent.data();
    request.guidance = job->guidance.data();
    request.guidance_steps = 1;
    request.rows = 1;
    request.dim = shape_.dim();
    request.branches = 2;
    request.skip_threshold = threshold_;
    request.max_skip = max_skip_;
    request.tag = job;
    const std::lock_guard<std::mutex> lock(mutex_);
    engine_.submit(request);
    ++accepted_;
    changed_.notify_one();
  }

  // x and t are there already; the prompts of the entries are the host's to gather.
  void evaluate(const sidestep::Call& call) {
    const int64_t size = shape_.text_size();
    for (int64_t i = 0; i < call.size(); ++i) {
      const auto* job = static_cast<const Job*>(call.entries[i].tag);
      const float* from = job->text.data() + call.entries[i].branch * size;
      std::copy(from, from + size, text_.begin() + i * size);
    }
    model_->run(call.size(), x_.data(), t_.data(), text_.data(), u_.data());
  }

  void answer(const sidestep_result& result) {
    const std::unique_ptr<Job> job(static_cast<Job*>(result.tag));
    if (result.outcome == SIDESTEP_REQUEST_DONE) {
      const bool written = write_numbers(job->out, job->latent);
      say(job->name, written ? "done: " + std::to_string(result.calls) + " model calls"
                             : "failed: cannot write " + job->out);
    } else {
      say(job->name, std::string("failed: ") + result.error);
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    ++answered_;
  }

  void say(const std::string& name, const std::string& what) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::cout << name << ' ' << what << std::endl;
  }

  const Shape shape_;
  const std::unique_ptr<Model> model_;
  const float threshold_;
  const int max_skip_;
  sidestep::Engine engine_;
  std::map<std::string, sidestep::Plan> plans_;  // the front end's
  std::vector<float> x_, u_, t_, text_;          // the back end's

  std::mutex mutex_;
  std::condition_variable changed_;
  bool closed_ = false;
  int64_t accepted_ = 0, answered_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  const Shape shape;
  std::unique_ptr<Model> model = analytic_model(shape);
  float threshold = 0.0f;
  int max_skip = 0;
  try {
    for (int i = 1; i < argc; i += 3) {
      const std::string option = argv[i];
      if (i + 2 < argc && option == "--onnx") {
        model = onnx_model(argv[i + 1], argv[i + 2], shape);
      } else if (i + 2 < argc && option == "--skip") {
        threshold = std::stof(argv[i + 1]);
        max_skip = std::stoi(argv[i + 2]);
      } else {
        throw std::runtime_error("usage: server [--onnx LIBRARY MODEL] [--skip THRESHOLD MAX]");
      }
    }
    Server server(shape, std::move(model), threshold, max_skip);
    std::thread front([&server] { server.read(std::cin); });
    try {
      server.serve();
    } catch (const std::exception& error) {
      std::cerr << "server: " << error.what() << std::endl;
      std::_Exit(1);  // the front end may wait for a line for ever
    }
    front.join();
  } catch (const std::exception& error) {
    std::cerr << "server: " << error.what() << std::endl;
    return 1;
  }
}
