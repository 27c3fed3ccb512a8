// Vectors for one instruction set; included by *_block.h, after SIDESTEP_ISA and SIDESTEP_WIDTH are
// defined, once per instruction set.
#pragma once

#include "core/macros.h"
#include "kernels/cpu/dtype.h"

namespace sidestep {
namespace SIDESTEP_ISA {
namespace {

constexpr int kWidth = SIDESTEP_WIDTH;
constexpr int kLanes = 16;
constexpr int kParts = kLanes / kWidth;

// The compilers' generic vectors: on a processor without such registers they become smaller
// operations.
typedef float Vec __attribute__((vector_size(4 * SIDESTEP_WIDTH)));
typedef uint32_t WordVec __attribute__((vector_size(4 * SIDESTEP_WIDTH)));

template <typename V>
SIDESTEP_HOST_DEVICE V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <typename V>
SIDESTEP_HOST_DEVICE void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

SIDESTEP_HOST_DEVICE float absolute(float v) {
  return bits_to_float(float_to_bits(v) & 0x7fffffffu);
}
SIDESTEP_HOST_DEVICE Vec absolute(Vec v) { return (Vec)((WordVec)v & 0x7fffffffu); }

// Element i of a block belongs to lane i % 16; a block's lanes are added as a tree.
double lane_total(float (&lanes)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

}  // namespace
}  // namespace SIDESTEP_ISA
}  // namespace sidestep
