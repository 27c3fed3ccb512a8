// The exit score for AVX2 and F16C (compiled with -mavx2 -mf16c, run only where both are present).
#include <immintrin.h>

#define SIDESTEP_ISA avx2
#define SIDESTEP_WIDTH 8
#include "kernels/cpu/exit_score_block.h"
