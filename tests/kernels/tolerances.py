"""Every tolerance of the operators' tests, with its reason. What is not here is exact."""

from __future__ import annotations

import torch

# A mean over D elements of one sign: each backend adds fp32 partial sums in an order of its own.
# Chains are at most a few hundred additions long; their rounding errors add up like a random walk.
STATS_RTOL = 3e-6

# An inner product of D terms, relative to the lengths of its two vectors, for the same reason.
GRAM_RTOL = 3e-6

# The fused step against float64: fewer than ten fp32 roundings of terms of the size of the result.
FLOAT64_RTOL, FLOAT64_ATOL = 2e-6, 1e-5

# A logit of size 1 to 4: fp32 sums of D products, in an order of each backend's own, and an exp
# that the GPU rounds to two ulps. The mean over tokens is float64.
SCORE_ATOL = 3e-6

# The same for tokens whose mean is 100 times their deviation: the mean is off by half an ulp of 100
# (4e-6) in every element. With the textbook's E[h^2] - mu^2 it would be 1e-3.
LARGE_MEAN_ATOL = 3e-5

# Registers are fp32 and exact everywhere. The model input is exact too, except that Triton's
# interpreter (and nothing else) may truncate where the hardware rounds to nearest even: one ulp.
INTERPRETER_MODEL_INPUT_ULPS = {torch.float32: 0, torch.float16: 0, torch.bfloat16: 1}
