// CUDA's bfloat16 on the CPU, converted as the native kernels do.
#pragma once

#include "kernels/cpu/dtype.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  return sidestep::bfloat16_to_float(value.bits);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  return {sidestep::float_to_bfloat16(value)};
}
