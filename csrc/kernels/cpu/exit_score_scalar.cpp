// The exit score without any instruction set in mind: correct on every processor.
#define SIDESTEP_ISA scalar
#define SIDESTEP_WIDTH 4
#include "kernels/cpu/exit_score_block.h"
