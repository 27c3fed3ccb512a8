"""`profiling/evidence.py` fails where a piece fails, is missing, or could not be looked at."""

import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROFILING = ROOT / "profiling"
HOLDS = "def test(): assert 1 + 1 == 2\n"
FAILS = "def test(): assert 1 + 1 == 3\n"
SKIPS = "import pytest\ndef test(): pytest.skip('no such tool')\n"


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(PROFILING)
    import evidence

    return evidence


def _root(tmp_path: Path, **files: str) -> Path:
    for name, text in files.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: as in the project\n")
    return tmp_path


def _piece(evidence: ModuleType, *files: str, **more: object) -> object:
    return evidence.Piece("planted", "what it shows", tuple(f"test_{f}.py" for f in files), **more)


@pytest.mark.parametrize(
    ("files", "more", "problem"),
    [
        ({"a": HOLDS}, {}, None),
        ({"a": HOLDS, "b": HOLDS + "assert False\n"}, {}, "1 failed"),  # at its import
        ({"a": HOLDS, "b": FAILS}, {}, "1 failed"),
        ({"a": HOLDS, "b": SKIPS}, {}, "1 could not be looked at"),
        ({"a": HOLDS, "b": SKIPS}, {"may_skip": "another reason"}, "1 could not be looked at"),
        ({"a": HOLDS, "b": SKIPS}, {"may_skip": "no such tool"}, None),
        ({"b": SKIPS}, {"may_skip": "no such tool"}, "nothing was looked at"),
        ({"b": SKIPS}, {"may_skip": "no such tool", "may_skip_all": True}, None),
        ({"a": HOLDS}, {"marked": "gpu"}, "no tests were found"),
        ({"a": "import os\nos._exit(7)\n"}, {}, "pytest ended with 7"),
    ],
)
def test_what_holds(
    evidence: ModuleType,
    tmp_path: Path,
    files: dict[str, str],
    more: dict[str, object],
    problem: str | None,
) -> None:
    found = evidence.look(_piece(evidence, *files, **more), _root(tmp_path, **files))
    assert found.problem == problem
    assert found.skipped == ("no such tool",) * (SKIPS in files.values())


def test_a_selection_of_nothing_is_no_evidence(evidence: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"planted: no file is test_gone\.py"):
        evidence.look(_piece(evidence, "gone"), tmp_path)


def test_the_command(
    evidence: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One piece that fails makes the whole of it fail, and the others are in the report."""
    (tmp_path / "tests").mkdir()
    root = _root(tmp_path, good=HOLDS, bad=FAILS)
    look, command = evidence.look, evidence.command
    monkeypatch.setattr(evidence, "look", lambda piece: look(piece, root))
    monkeypatch.setattr(evidence, "command", lambda piece, _=None: command(piece, root))
    good = evidence.Piece("good", "sums", ("test_good.py",))
    bad = evidence.Piece("bad", "more sums", ("test_bad.py",))
    monkeypatch.setattr(evidence, "PIECES", (bad, good))
    with pytest.raises(SystemExit) as stopped:
        evidence.main([])
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    rows = [line.split(" | ")[:3] for line in captured.out.splitlines()[2:]]
    assert rows == [["| bad", "more sums", "**1 failed**"], ["| good", "sums", "1 passed"]]
    assert "assert (1 + 1) == 3" in captured.err
    assert captured.err.endswith("evidence: bad of 2 pieces do not hold\n")
    evidence.main(["--only", "good", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["holds"]) for one in document["results"]] == [("good", True)]
    assert "torch" in document["environment"]


def test_every_piece_is_there_and_explained(evidence: ModuleType) -> None:
    page = (ROOT / "docs/evidence.md").read_text()
    for piece in evidence.PIECES:
        assert str(ROOT) in evidence.command(piece)[-1]
        assert f"| `{piece.name}` |" in page, piece.name
    assert page.count("\n| `") == len(evidence.PIECES)
