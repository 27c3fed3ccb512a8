// CUDA's half on the CPU, converted as the native kernels do.
#pragma once

#include "kernels/cpu/dtype.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) { return sidestep::float16_to_float(value.bits); }
inline __half __float2half_rn(float value) { return {sidestep::float_to_float16(value)}; }
