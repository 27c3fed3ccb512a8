// Runs a fuzz target without libFuzzer: mutated files of a corpus, and bytes out of nowhere.
//
//     plan_fuzz SECONDS SEED [FILE ...]
//
// A file that ends the program is named after its seed and round, and can be given again with 0
// seconds. Built with clang, the same targets are libFuzzer's.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Bytes = std::vector<uint8_t>;

Bytes read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed) {}

  Bytes mutated(Bytes bytes) {
    for (uint64_t edits = below(5); edits > 0; --edits) edit(&bytes);
    return bytes;
  }

  Bytes fresh() {
    Bytes bytes(below(400));
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random_());
    return bytes;
  }

  uint64_t below(uint64_t most) { return most == 0 ? 0 : random_() % most; }

 private:
  void edit(Bytes* bytes) {
    const uint64_t at = below(bytes->size());
    const uint64_t kind = bytes->empty() ? 2 : below(5);
    const auto place = bytes->begin() + static_cast<std::ptrdiff_t>(at);
    if (kind == 0) {
      *place ^= static_cast<uint8_t>(1u << below(8));
    } else if (kind == 1) {
      *place = static_cast<uint8_t>(random_());
    } else if (kind == 2) {
      const Bytes more = fresh();
      bytes->insert(place, more.begin(), more.begin() + below(std::min<uint64_t>(more.size(), 9)));
    } else if (kind == 3) {
      const uint64_t count = 1 + below(std::min<uint64_t>(bytes->size() - at, 16));
      bytes->erase(place, place + static_cast<std::ptrdiff_t>(count));
    } else {
      *place = "0123456789[]{}\",:\\u-."[below(21)];  // what the header is made of
    }
  }

  std::mt19937_64 random_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s SECONDS SEED [FILE ...]\n", argv[0]);
    return 2;
  }
  const auto end = std::chrono::steady_clock::now() +
                   std::chrono::duration<double>(std::strtod(argv[1], nullptr));
  Mutator mutator(std::strtoull(argv[2], nullptr, 10));
  std::vector<Bytes> corpus;
  for (int i = 3; i < argc; ++i) corpus.push_back(read(argv[i]));
  for (const Bytes& bytes : corpus) LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  const std::string kept = std::string("crash-") + argv[2];
  int64_t rounds = 0;
  for (; std::chrono::steady_clock::now() < end; ++rounds) {
    const bool mutates = !corpus.empty() && mutator.below(10) > 0;
    const Bytes bytes =
        mutates ? mutator.mutated(corpus[mutator.below(corpus.size())]) : mutator.fresh();
    // Written before the call, so that it is there after a crash.
    std::ofstream(kept, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::remove(kept.c_str());
  std::printf("%lld rounds\n", static_cast<long long>(rounds));
  return 0;
}
