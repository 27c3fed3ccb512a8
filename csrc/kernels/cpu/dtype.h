// Half precision in portable integer arithmetic: exactly what F16C and the GPU do, round to nearest
// even.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/solver_step.h"

namespace sidestep {

SIDESTEP_HOST_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

SIDESTEP_HOST_DEVICE uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

SIDESTEP_HOST_DEVICE float float16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t fraction = half & 0x3ffu;
  if (exponent == 0x1fu) {  // infinity, or NaN made quiet
    return bits_to_float(sign | 0x7f800000u | (fraction << 13) | (fraction != 0 ? 0x400000u : 0u));
  }
  if (exponent == 0) {  // a multiple of 2^-24: exact
    return bits_to_float(sign | float_to_bits(static_cast<float>(fraction) * 0x1p-24f));
  }
  return bits_to_float(sign | ((exponent + 112u) << 23) | (fraction << 13));
}

SIDESTEP_HOST_DEVICE uint16_t float_to_float16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {  // NaN made quiet
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 shifts the last bit to 2^-24, and the addition rounds.
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

SIDESTEP_HOST_DEVICE float bfloat16_to_float(uint16_t value) {
  return bits_to_float(static_cast<uint32_t>(value) << 16);
}

SIDESTEP_HOST_DEVICE uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

}  // namespace sidestep
