// Finds the processor's instruction sets once.
#include "kernels/cpu/simd.h"

#include <atomic>
#include <cstring>

#ifdef SIDESTEP_X86
#include <cpuid.h>
#endif

namespace sidestep {
namespace {

#ifdef SIDESTEP_X86
bool has_avx2() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  return f16c && __builtin_cpu_supports("avx2");
}
bool has_avx512() { return has_avx2() && __builtin_cpu_supports("avx512f"); }
#endif

constexpr Simd kSimd[] = {
#ifdef SIDESTEP_X86
    {"avx512", avx512::step_chunk, avx512::gram_chunk, avx512::correct_chunk, avx512::score_chunk,
     has_avx512},
    {"avx2", avx2::step_chunk, avx2::gram_chunk, avx2::correct_chunk, avx2::score_chunk, has_avx2},
#endif
    {"scalar", scalar::step_chunk, scalar::gram_chunk, scalar::correct_chunk, scalar::score_chunk,
     [] { return true; }},
};

const Simd* best() {
  const Simd* simd = kSimd;
  while (!simd->present()) ++simd;
  return simd;
}

std::atomic<const Simd*>& current() {
  static std::atomic<const Simd*> chosen{best()};
  return chosen;
}

}  // namespace

const Simd& simd() { return *current().load(std::memory_order_relaxed); }

Status set_simd(const char* name) {
  for (const Simd& known : kSimd) {
    if (std::strcmp(known.name, name) != 0) continue;
    if (!known.present()) {
      return invalid_argument("set_simd: name is %s, which this processor lacks", name);
    }
    current().store(&known, std::memory_order_relaxed);
    return Status();
  }
  return invalid_argument("set_simd: name is %.40s, which this build does not have", name);
}

}  // namespace sidestep
