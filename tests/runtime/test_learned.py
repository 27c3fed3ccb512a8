"""The learned criterion: its signals and its network against numpy, and its file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criteria.learned import (
    FORMAT,
    SIGNALS,
    Predictor,
    Signals,
    load_predictor,
)
from sidestep.runtime.methods.criterion import Course, Observation

ROWS, STEPS, SIZE = 3, 16, 24
LOG_SNR = np.cumsum(np.random.default_rng(0).random(STEPS) + 0.1) - 4
rng = np.random.default_rng(5)
LATENTS = np.cumsum(rng.standard_normal((STEPS + 1, ROWS, SIZE)), 0).astype(np.float32)
OUTPUTS = np.cumsum(rng.standard_normal((STEPS, ROWS, SIZE)), 0).astype(np.float32)
COMPUTED = rng.random((STEPS, ROWS)) < 0.6
COMPUTED[:3] = True


def signals(log_snr: list[float] | None, rows: slice = slice(None)) -> list[torch.Tensor | None]:
    """Ours, after every step."""
    x, u = torch.tensor(LATENTS)[:, rows], torch.tensor(OUTPUTS)[:, rows]
    computed = COMPUTED[:, rows].tolist()
    formed = Signals(Course(rows=x.shape[1], steps=STEPS, log_snr=log_snr), "linear")
    return [
        formed.put(Observation(step=k, x=x[k], x_next=x[k + 1], output=u[k], computed=computed[k]))
        for k in range(STEPS)
    ]


def transcribed(k: int, row: int) -> list[float]:
    """The ten numbers before their logarithm (but lambda), float64."""
    x, u = LATENTS[:, row].astype(float), OUTPUTS[:, row].astype(float)
    delta = np.abs(np.diff(x, axis=0)).mean(1)
    fresh = [i for i in range(k + 1) if COMPUTED[i, row]]
    error = change = math.nan
    if len(fresh) >= 2:
        i, j = fresh[-1], fresh[-2]
        before = [j, fresh[-3]] if len(fresh) > 2 else [j]
        line = u[j]
        if len(before) == 2:
            slope = (u[j] - u[before[1]]) / (LOG_SNR[j] - LOG_SNR[before[1]])
            line = u[j] + slope * (LOG_SNR[i] - LOG_SNR[j])
        size = np.abs(u[i]).mean()
        error = np.abs(u[i] - line).mean() / size
        change = np.abs(u[i] - u[j]).mean() / size / (i - j)
    reach = 1.0
    if len(fresh) >= 2:
        ahead = LOG_SNR[k + 1] - LOG_SNR[fresh[-1]]
        reach = ahead / (LOG_SNR[fresh[-1]] - LOG_SNR[fresh[-2]])
    third = np.abs(x[k + 1] - 3 * x[k] + 3 * x[k - 1] - x[k - 2]).mean() / 2
    return [
        abs((delta[k] + delta[k - 2]) / 2 - delta[k - 1]) / delta[k - 1],
        third / delta[k - 1],
        delta[k] / delta[k - 1],
        delta[k] / np.abs(x[k + 1]).mean(),
        error,
        change,
        reach,
        k + 1 - fresh[-1],
        math.exp(LOG_SNR[k + 1]),
        LOG_SNR[k + 1] - LOG_SNR[k],
    ]


def test_signals_equal_their_transcription() -> None:
    ours = signals(LOG_SNR.tolist())
    assert ours[0] is None and ours[1] is None
    for k in range(2, STEPS - 1):
        formed = ours[k]
        assert formed is not None and formed.shape == (ROWS, len(SIGNALS))
        for row in range(ROWS):
            expected = np.log(transcribed(k, row))
            np.testing.assert_allclose(formed[row].numpy(), expected, rtol=1e-4, atol=1e-3)


def test_signals_of_lambda_are_left_open_where_it_is_not_known() -> None:
    for ours in (signals(None)[5], signals([*LOG_SNR[:6].tolist(), math.inf])[5]):
        assert ours is not None
        assert ours.isnan().all(0).tolist() == [False] * 8 + [True] * 2
    last = signals(LOG_SNR.tolist())[-1]  # no step comes after it
    assert last is not None and last[:, -2:].isnan().all() and last[:, :-2].isfinite().all()


def test_signals_of_a_row_do_not_depend_on_the_others() -> None:
    together = signals(LOG_SNR.tolist())[2:]
    for row in range(ROWS):
        alone = signals(LOG_SNR.tolist(), slice(row, row + 1))[2:]
        for a, b in zip(alone, together, strict=True):
            assert a is not None and b is not None
            assert a.dtype == torch.float32
            torch.testing.assert_close(a[0], b[row], rtol=0, atol=0, equal_nan=True)


def predictor(units: int = 5, reuse: str = "linear") -> Predictor:
    generator = torch.Generator().manual_seed(1)
    n = len(SIGNALS)
    return Predictor(
        reuse=reuse,
        centre=torch.randn(n, generator=generator),
        spread=torch.rand(n, generator=generator) + 0.5,
        hidden=torch.randn(n + 1, units, generator=generator),
        outer=torch.randn(units + 1, generator=generator),
    )


def test_network_equals_its_formula() -> None:
    f, s = predictor(), torch.randn(7, len(SIGNALS), generator=torch.Generator().manual_seed(2))
    s[1, 3] = math.nan
    s[2, 4] = 1e6
    z = ((s - f.centre) / f.spread).double().numpy()
    z[1, 3] = 0
    z = z.clip(-4, 4)
    hidden = np.tanh(z @ f.hidden[:-1].double().numpy() + f.hidden[-1].double().numpy())
    expected = hidden @ f.outer[:-1].double().numpy() + float(f.outer[-1])
    np.testing.assert_allclose(f(s).numpy(), expected, rtol=1e-5, atol=1e-5)
    for row in range(7):
        assert torch.equal(f(s[row : row + 1])[0], f(s)[row])


def saved(path: Path, f: Predictor, **metadata: str) -> str:
    tensors = {name: getattr(f, name) for name in ("centre", "spread", "hidden", "outer")}
    save_file(tensors, path, {"format": FORMAT, "reuse": f.reuse, **metadata})
    return str(path)


def test_the_file_decides(tmp_path: Path) -> None:
    f = predictor()
    path = saved(tmp_path / "f.safetensors", f)
    read = load_predictor(path)
    assert read.reuse == "linear" and torch.equal(read.hidden, f.hidden)
    settings = Adaptive(mode="learned", predictor=path, threshold=1e9, debt=False)
    criterion = settings.criterion()
    criterion.start(Course(rows=ROWS, steps=STEPS, log_snr=LOG_SNR.tolist()))
    x, u = torch.tensor(LATENTS), torch.tensor(OUTPUTS)
    for k in range(4):
        seen = Observation(step=k, x=x[k], x_next=x[k + 1], output=u[k], computed=[True] * ROWS)
        decision = criterion.observe(seen)
    assert decision.compute == [False] * ROWS and decision.value is not None
    formed = Signals(Course(rows=ROWS, steps=STEPS, log_snr=LOG_SNR.tolist()), "linear")
    for k in range(4):
        seen = Observation(step=k, x=x[k], x_next=x[k + 1], output=u[k], computed=[True] * ROWS)
        numbers = formed.put(seen)
    assert numbers is not None
    assert torch.equal(decision.value, f(numbers).exp())


def test_files_that_are_no_predictor_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the predictor .*nowhere"):
        Adaptive(mode="learned", predictor=str(tmp_path / "nowhere"))
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="cannot read the predictor"):
        Adaptive(mode="learned", predictor=str(tmp_path / "text"))
    other = saved(tmp_path / "other", predictor(), format="sidestep-adaptive-predictor-0")
    with pytest.raises(ValueError, match=r"other is no predictor of this version"):
        Adaptive(mode="learned", predictor=other)
    save_file({"centre": torch.zeros(3)}, tmp_path / "part", {"format": FORMAT})
    with pytest.raises(ValueError, match=r"part is no predictor of this version"):
        Adaptive(mode="learned", predictor=str(tmp_path / "part"))
    held = saved(tmp_path / "held", predictor(reuse="hold"))
    with pytest.raises(ValueError, match="trained for reuse='hold', got 'linear'"):
        Adaptive(mode="learned", predictor=held)
    assert Adaptive(mode="learned", predictor=held, reuse="hold").criterion().history == 1


def test_the_one_that_ships() -> None:
    f = load_predictor(None)
    assert f.reuse == "linear"
    assert all(torch.isfinite(getattr(f, name)).all() for name in ("centre", "hidden", "outer"))
    usual = f.centre[None].repeat(3, 1)
    usual[:, SIGNALS.index("ln error")] += f.spread[SIGNALS.index("ln error")] * torch.arange(-1, 2)
    errors = f(usual).exp().tolist()
    assert 1e-4 < errors[0] < errors[1] < errors[2] < 1  # a worse reuse rule means more error
