// The parareal operators for AVX-512 (compiled with -mavx512f, run only where it is present).
#define SIDESTEP_ISA avx512
#define SIDESTEP_WIDTH 16
#include "kernels/cpu/parareal_block.h"
