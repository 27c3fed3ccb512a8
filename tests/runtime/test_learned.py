"""The learned criterion: its signals and its network against numpy, and its file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criteria import learned
from sidestep.runtime.methods.criteria.carried_error import carried_error
from sidestep.runtime.methods.criteria.learned import (
    FORMAT,
    SIGNALS,
    Predictor,
    Signals,
    load_predictor,
    predictor_on,
)
from sidestep.runtime.methods.criteria.reused import Reused
from sidestep.runtime.methods.criterion import Course, Observation

ROWS, STEPS, SIZE = 3, 16, 24
LOG_SNR = np.cumsum(np.random.default_rng(0).random(STEPS) / 4 + 0.1) - 4
rng = np.random.default_rng(5)
LATENTS = np.cumsum(rng.standard_normal((STEPS + 1, ROWS, SIZE)), 0).astype(np.float32)
OUTPUTS = np.cumsum(rng.standard_normal((STEPS, ROWS, SIZE)), 0).astype(np.float32)
COMPUTED = rng.random((STEPS, ROWS)) < 0.6
COMPUTED[:3] = True


def course(log_snr: list[float] | None, rows: int = ROWS, multistep: bool = False) -> Course:
    return Course(rows=rows, steps=STEPS, log_snr=log_snr, multistep=multistep)


def seen(k: int, rows: slice = slice(None), computed: np.ndarray = COMPUTED) -> Observation:
    x, u = torch.tensor(LATENTS)[:, rows], torch.tensor(OUTPUTS)[:, rows]
    return Observation(
        step=k, x=x[k], x_next=x[k + 1], output=u[k], computed=computed[k, rows].tolist()
    )


def signals(
    log_snr: list[float] | None,
    rule: str = "damped",
    rows: slice = slice(None),
    multistep: bool = False,
) -> list[torch.Tensor | None]:
    """Ours, after every step."""
    reused = Reused(course(log_snr, len(range(ROWS)[rows]), multistep), rule)
    formed = Signals(reused)
    numbers = []
    for k in range(STEPS):
        reused.put(seen(k, rows))
        numbers.append(formed.put(seen(k, rows)))
    return numbers


def transcribed(k: int, row: int, rule: str, multistep: bool) -> list[float]:
    """The signals of one row in float64, from the start."""
    u = OUTPUTS[:, row].astype(float)
    rms = lambda v: math.sqrt((v**2).mean())  # noqa: E731
    fresh = [i for i in range(k + 1) if COMPUTED[i, row]]
    measured = [(math.nan, math.nan, 0.5)]
    for n in range(1, len(fresh)):
        b, i, j = fresh[n], fresh[n - 1], fresh[n - 2]
        line = np.zeros(SIZE)
        damping = 1.0
        if n > 1:
            line = (u[i] - u[j]) * (LOG_SNR[b] - LOG_SNR[i]) / (LOG_SNR[i] - LOG_SNR[j])
        if rule == "damped":
            reach = LOG_SNR[b] - LOG_SNR[j if n > 1 else i]
            damping = max(measured[-1][2], 0 if multistep else 1 / (1 + (reach / 0.7) ** 8))
        error = math.log(rms(u[b] - u[i] - damping * line) / rms(u[b]) + 1e-6)
        change = math.log(rms(u[b] - u[i]) / rms(u[b]) / (b - i) + 1e-6)
        share = min(1, max(0, (u[b] - u[i]) @ line / (line @ line))) if n > 1 else 0.5
        measured.append((error, change, share))
    spans = [*np.diff(fresh)[::-1][:2].tolist(), 1, 1][:2]
    return [
        *measured[-1],
        *measured[-2],
        *np.log([*spans, k + 1 - fresh[-1]]),
        math.log(LOG_SNR[k + 1] - LOG_SNR[fresh[-1]]),
        math.log(LOG_SNR[k + 1] - LOG_SNR[k]),
        LOG_SNR[k + 1],
        float(multistep),
    ]


@pytest.mark.parametrize("multistep", [False, True])
@pytest.mark.parametrize("rule", ["damped", "linear"])
def test_signals_equal_their_transcription(rule: str, multistep: bool) -> None:
    ours = signals(LOG_SNR.tolist(), rule, multistep=multistep)
    assert ours[0] is None
    for k in range(1, STEPS - 1):
        formed = ours[k]
        assert formed is not None and formed.shape == (ROWS, len(SIGNALS))
        for row in range(ROWS):
            expected = transcribed(k, row, rule, multistep)
            assert np.isnan(expected).any() == (k == 1)
            np.testing.assert_allclose(formed[row].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_signals_of_lambda_are_left_open_where_it_is_not_known() -> None:
    open_ = [False] * 9 + [True] * 3 + [False]
    for ours in (signals(None)[5], signals([*LOG_SNR[:6].tolist(), math.inf])[5]):
        assert ours is not None
        assert ours.isnan().all(0).tolist() == open_
    last = signals(LOG_SNR.tolist())[-1]  # no step comes after it
    assert last is not None and last.isnan().all(0).tolist() == open_
    noise = signals([-math.inf, *LOG_SNR[1:].tolist()])[2]
    assert noise is not None and noise.isfinite().all()


def test_signals_of_a_row_do_not_depend_on_the_others() -> None:
    together = signals(LOG_SNR.tolist())[1:]
    for row in range(ROWS):
        alone = signals(LOG_SNR.tolist(), rows=slice(row, row + 1))[1:]
        for a, b in zip(alone, together, strict=True):
            assert a is not None and b is not None
            assert a.dtype == torch.float32
            torch.testing.assert_close(a[0], b[row], rtol=0, atol=0, equal_nan=True)


def predictor(units: int = 5, reuse: str = "damped") -> Predictor:
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


@pytest.mark.parametrize("snr", [LOG_SNR.tolist(), (LOG_SNR + 3).tolist(), None])
def test_the_file_decides(snr: list[float] | None, tmp_path: Path) -> None:
    f = predictor()
    path = saved(tmp_path / "f.safetensors", f)
    read = load_predictor(path)
    assert read.reuse == "damped" and torch.equal(read.hidden, f.hidden)
    settings = Adaptive(mode="learned", predictor=path, threshold=1e30, debt=False)
    criterion = settings.criterion()
    criterion.start(course(snr))
    for k in range(4):
        decision = criterion.observe(seen(k, computed=np.ones((STEPS, ROWS), bool)))
    assert decision.compute == [False] * ROWS and decision.value is not None
    reused = Reused(course(snr), "damped")
    formed = Signals(reused)
    for k in range(4):
        step = seen(k, computed=np.ones((STEPS, ROWS), bool))
        reused.put(step)
        numbers = formed.put(step)
    assert numbers is not None
    size = torch.tensor(OUTPUTS[3]).square().mean(1).sqrt()
    early = 1.7 if snr is not None and snr[4] < -1 else 1.0
    assert (early > 1) == (snr == LOG_SNR.tolist())
    error = early * carried_error(course(snr))[4] * size * f(numbers).exp()
    relative = error / 0.008
    expected = 0.008 * torch.where(relative > 1, relative**1.4, relative**0.3)
    torch.testing.assert_close(decision.value, expected)


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
    with pytest.raises(ValueError, match="trained for reuse='hold', got 'damped'"):
        Adaptive(mode="learned", predictor=held)
    assert Adaptive(mode="learned", predictor=held, reuse="hold").criterion().history == 1


def test_the_one_that_ships() -> None:
    f = load_predictor(None)
    assert f.reuse == "damped"
    assert all(torch.isfinite(getattr(f, name)).all() for name in ("centre", "hidden", "outer"))
    for name in ("ln error", "ln change", "ln skipped"):  # each means more error
        usual = f.centre[None].repeat(3, 1)
        usual[:, SIGNALS.index(name)] += f.spread[SIGNALS.index(name)] * torch.arange(-1, 2)
        errors = f(usual).exp().tolist()
        assert 1e-3 < errors[0] < errors[1] < errors[2] < 1, name


def test_a_file_is_read_once_until_it_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def counted(file: Path, framework: str) -> Any:
        opened.append(file.name)
        return safe_open(file, framework=framework)

    monkeypatch.setattr(learned, "safe_open", counted)
    path = saved(tmp_path / "one.safetensors", predictor())
    settings = Adaptive(predictor=path)
    criteria = [settings.criterion() for _ in range(5)]
    assert opened == ["one.safetensors"]
    assert load_predictor(path) is load_predictor(path)
    for criterion in criteria:
        criterion.start(course(LOG_SNR.tolist()))
        for k in range(3):
            criterion.observe(seen(k, computed=np.ones((STEPS, ROWS), bool)))
    cpu, meta = torch.device("cpu"), torch.device("meta")
    f = load_predictor(path)
    assert predictor_on(cpu, f) is f
    assert predictor_on(meta, f) is predictor_on(meta, f) and predictor_on(meta, f).outer.is_meta
    saved(tmp_path / "one.safetensors", predictor(units=7))
    assert load_predictor(path).outer.shape == (8,) and len(opened) == 2
    (tmp_path / "one.safetensors").unlink()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"cannot read the predictor .*one.safetensors: .*No"):
            settings.criterion()


def test_it_takes_the_rule_of_its_predictor_only() -> None:
    with pytest.raises(ValueError, match=r"got 'linear'; mode 'learned' takes its predictor's rul"):
        Adaptive(reuse="linear")
    assert Adaptive(reuse="linear", mode="error-control").criterion().history == 2
