"""A pipeline's call in stages: what requests that share model calls get is what the call returns."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_cases
import torch
from tiny_cases import CASES

from sidestep import Adaptive, Engine, EngineLoop
from sidestep.adapters.stages import Stages
from sidestep.runtime.methods.early_exit import EarlyExit

STEPS = 4
TEXT_TO_IMAGE = ("sd", "sdxl", "sd3", "flux", "pixart")
