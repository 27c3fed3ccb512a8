// The exit score for AVX-512 (compiled with -mavx512f, run only where it is present).
#include <immintrin.h>

#define SIDESTEP_ISA avx512
#define SIDESTEP_WIDTH 16
#include "kernels/cpu/exit_score_block.h"
