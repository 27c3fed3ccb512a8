// The fused step for AVX-512 (compiled with -mavx512f, run only where it is present).
#include <immintrin.h>

#define SIDESTEP_ISA avx512
#define SIDESTEP_WIDTH 16
#include "kernels/cpu/solver_step_block.h"
