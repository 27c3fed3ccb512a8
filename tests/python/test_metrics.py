"""Distances between pictures, against values worked out by hand."""

import math

import pytest
import torch

from sidestep.metrics import latent_rms, mean_psnr, psnr, ssim


def test_psnr_of_a_known_error() -> None:
    a = torch.zeros(2, 3, 16, 16)
    b = torch.stack([torch.full((3, 16, 16), 0.1), torch.zeros(3, 16, 16)])
    assert psnr(b, a) == [pytest.approx(20.0, abs=1e-5), math.inf]


def test_mean_counts_identical_pictures_at_the_cap() -> None:
    assert mean_psnr([20.0, math.inf]) == 60.0
    assert math.isnan(mean_psnr([]))


def test_ssim_is_per_picture() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, 32, 32, generator=generator)
    b = a.clone()
    b[1] = torch.rand(3, 32, 32, generator=generator)
    same, other = ssim(a, b)
    assert same == pytest.approx(1, abs=1e-6) and other < 0.2
    assert ssim(a[:1], b[:1]) == [pytest.approx(1, abs=1e-6)]


def test_latent_rms_is_per_row() -> None:
    a = torch.zeros(2, 4, 2, 2)
    b = a.clone()
    b[1] = 3
    assert latent_rms(a, b) == [0.0, 3.0]


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"a has shape \[1, 3, 8, 8\], expected \[2, 3, 8, 8\]"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8))
