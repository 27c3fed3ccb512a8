"""Plan files in C: read as Python reads them, and refused with the reason where it would."""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import capi
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidestep import Plan
from sidestep.runtime.schedules import DiscreteVP
from sidestep.runtime.solvers import find_solver

SCHEDULE = DiscreteVP.from_betas(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SOLVERS = ("ddim", "dpmsolver++3s", "sde-dpmsolver++2m", "unipc2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


def named(name: str) -> Plan:
    return Plan(
        name=name, matrices=np.ones((3, 1, 2)), timesteps=np.arange(3.0), input_scales=np.ones(3)
    )


def read(data: bytes) -> tuple[int, str]:
    """The status of reading these bytes, and the sentence or the digest."""
    plan = ctypes.c_void_p()
    status = capi.call("plan_read", data, len(data), ctypes.byref(plan))
    if status != capi.OK:
        assert not plan.value and capi.error().startswith("plan: ")
        return status, capi.error()
    info = capi.PlanInfo()
    capi.must("plan_describe", plan, ctypes.byref(info))
    digest = info.digest.decode()
    capi.library().sidestep_plan_destroy(plan)
    return status, digest


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_plan_is_read_as_python_wrote_it(folder: Path, solver: str) -> None:
    plan = find_solver(solver).plan(SCHEDULE, "linspace", 7)
    plan.save(folder / solver)
    handle, info = capi.load(folder / solver), capi.PlanInfo()
    capi.must("plan_describe", handle, ctypes.byref(info))
    assert (info.name.decode(), info.digest.decode()) == (plan.name, plan.digest)
    assert (info.steps, info.num_registers) == (len(plan), plan.registers)
    assert (info.initial_scale, info.noise_columns) == (plan.initial_scale, plan.noise_columns)
    assert bool(info.stochastic) == plan.stochastic
    times, scales = np.zeros((2, len(plan)))
    to = [array.ctypes.data_as(ctypes.POINTER(ctypes.c_double)) for array in (times, scales)]
    capi.must("plan_calls", handle, *to)
    assert (times == plan.timesteps).all() and (scales == plan.input_scales).all()
    capi.library().sidestep_plan_destroy(handle)


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
    st.floats(1e-320, 1e300),
)
@example('it\'s "both" \\ \t\n\r\x7f é \u2028 \U0001f438', 5e-324)
def test_any_name_and_scale(folder: Path, name: str, scale: float) -> None:
    plan = Plan(
        name=name, matrices=np.ones((1, 1, 2)), timesteps=[1.0], input_scales=[1.0],
        initial_scale=scale,
    )  # fmt: skip
    plan.save(folder / "named")
    assert read((folder / "named").read_bytes()) == (capi.OK, plan.digest)


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: Any, arrays: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + arrays


def changed(**values: Any) -> Callable[[dict, bytes], bytes]:
    return lambda header, arrays: joined({**header, **values}, arrays)


def member(name: str, /, **values: Any) -> Callable[[dict, bytes], bytes]:
    return lambda header, arrays: joined({**header, name: {**header[name], **values}}, arrays)


HOSTILE: dict[str, tuple[Callable[[dict, bytes], bytes], str]] = {
    "nothing": (lambda h, a: b"", "0 bytes are fewer than its header has"),
    "huge header": (lambda h, a: b"\xff" * 8 + a, "fewer than its header has"),
    "not JSON": (lambda h, a: joined(b"hello", a), "wrong at byte 0, expected '{'"),
    "deep": (lambda h, a: joined(b"[" * 100_000, a), "expected '{'"),
    "long header": (lambda h, a: joined(b" " * (1 << 21), a), "expected at most 1048576"),
    "bad UTF-8": (lambda h, a: joined(b'{"\xff":0}', a), "valid UTF-8"),
    "lone surrogate": (lambda h, a: joined(b'{"\\ud800":0}', a), "a valid escape"),
    "twice": (lambda h, a: joined(b'{"__metadata__":{},"__metadata__":{}}', a), "each key once"),
    "truncated": (lambda h, a: joined(h, a[:-1]), "has bytes"),
    "trailing": (lambda h, a: joined(h, a + b"x"), "the arrays end at byte"),
    "format": (member("__metadata__", format="pickle"), "its format is 'pickle', expected"),
    "altered name": (member("__metadata__", name="other"), "its digest does not match"),
    "altered number": (
        lambda h, a: joined(h, a[:-8] + bytes([a[-8] ^ 1]) + a[-7:]),
        "its digest does not match",
    ),
    "scale": (member("__metadata__", initial_scale="0x1p0"), "its initial_scale is '0x1p0'"),
    "negative scale": (
        member("__metadata__", initial_scale="-0x1.0000000000000p+0"),
        "expected a finite number above 0",
    ),
    "threshold": (member("__metadata__", threshold='{"max": 1}'), "dynamic thresholding"),
    "no steps": (lambda h, a: joined({"__metadata__": h["__metadata__"]}, b""), "no matrices"),
    "unknown array": (
        changed(extra={"dtype": "F64", "shape": [0], "data_offsets": [0, 0]}),
        "it holds the array extra",
    ),
    "dtype": (member("timesteps", dtype="F32"), "timesteps has dtype F32, expected F64 or I64"),
    "integers": (member("timesteps", dtype="I64"), "expected F64 (3,)"),
    "overflow": (
        member("matrices", shape=[2**59, 2**59, 2**59]),
        "matrices has more elements than the file has bytes for",
    ),
    "offsets": (member("timesteps", data_offsets=[0, 10**17]), "timesteps has bytes"),
    "shape": (member("matrices", shape=[3, 2, 1]), "expected F64 [K, R, R + 1 + J]"),
}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("matrices", [[[1.0, 0.0]], [[0.0, -1e300]], [[1.0, 0.0]]]),
        ("input_scales", [1.0, 3.5e38, 1.0]),
        ("timesteps", [1.0, 1e39, 1.0]),
    ],
)
def test_numbers_that_do_not_fit_in_fp32_are_refused(
    folder: Path, key: str, values: list[Any]
) -> None:
    arrays = {
        "matrices": np.ones((3, 1, 2)),
        "timesteps": np.arange(3.0),
        "input_scales": np.ones(3),
    }
    Plan(**{"name": "huge", **arrays, key: np.array(values)}).save(folder / "huge")
    status, sentence = read((folder / "huge").read_bytes())
    assert status == capi.INVALID
    assert f"{key} is " in sentence and "at step 1, expected a number that fits in fp32" in sentence


def test_the_largest_numbers_of_fp32_are_read(folder: Path) -> None:
    largest = float(np.finfo(np.float32).max)
    plan = Plan(
        name="large", matrices=np.full((1, 1, 2), -largest), timesteps=[1.0], input_scales=[largest]
    )
    plan.save(folder / "large")
    assert read((folder / "large").read_bytes()) == (capi.OK, plan.digest)


# Python reads a number written in another way, and leaves out an array that it does not know.
STRICTER = {"scale", "unknown array"}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_with_a_reason(folder: Path, name: str) -> None:
    named("plain").save(folder / "plain")
    change, reason = HOSTILE[name]
    data = change(*parts((folder / "plain").read_bytes()))
    status, sentence = read(data)
    assert status == capi.INVALID and reason in sentence, sentence
    (folder / "hostile").write_bytes(data)
    plan = ctypes.c_void_p()
    path = str(folder / "hostile").encode()
    assert capi.call("plan_load", path, ctypes.byref(plan)) == capi.INVALID
    if name not in STRICTER:
        with pytest.raises(ValueError):
            Plan.load(folder / "hostile")


@pytest.mark.parametrize("bad", ["missing", "."])
def test_paths_that_are_no_files(folder: Path, bad: str) -> None:
    plan = ctypes.c_void_p()
    path = str(folder / bad)
    assert capi.call("plan_load", path.encode(), ctypes.byref(plan)) == capi.INVALID
    assert path.rstrip("/.") in capi.error()


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_whatever_c_takes_python_takes(folder: Path, data: st.DataObject) -> None:
    solver = data.draw(st.sampled_from(SOLVERS))
    if not (folder / f"fuzz-{solver}").exists():
        find_solver(solver).plan(SCHEDULE, "linspace", 3).save(folder / f"fuzz-{solver}")
    content = bytearray((folder / f"fuzz-{solver}").read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(("flip", "cut", "insert")))
        if kind == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 9))]
        else:
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        if not content:
            break
    status, sentence = read(bytes(content))
    (folder / "mutated").write_bytes(content)
    if status == capi.OK:
        assert Plan.load(folder / "mutated").digest == sentence
