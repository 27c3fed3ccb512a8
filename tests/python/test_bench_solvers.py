"""`sidestep bench solvers` on a tiny sweep: the document, the claim, the report and the chart."""

import pytest

from sidestep.bench import solvers as suite


def test_a_tiny_sweep(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(suite, "SOLVERS", {k: suite.SOLVERS[k] for k in ("ddim", "dpmsolver++2m")})
    monkeypatch.setattr(suite, "GRIDS", {"karras": suite.GRIDS["karras"]})
    monkeypatch.setattr(suite, "PEERS", {k: suite.PEERS[k] for k in ("PNDMScheduler",)})
    monkeypatch.setattr(suite, "PNDM_STEPS", 6)
    document = suite.run(
        model="emoji-sd", prompts=1, reference_steps=12, calls=[3, 25], guidance=7.5, seed=0
    )
    ours = {(r["solver"], r["nfe"]): r for r in document["results"] if r["source"] == "sidestep"}
    assert set(ours) == {(s, n) for s in ("ddim", "dpmsolver++2m") for n in (3, 25)}
    for solver in ("ddim", "dpmsolver++2m"):
        assert ours[solver, 25]["latent_rms"] < ours[solver, 3]["latent_rms"]
    best = {row["calls"]: row for row in document["best"]}
    assert best[25]["latent_rms"] == min(ours[s, 25]["latent_rms"] for s, n in ours if n == 25)
    claim = document["claim"]
    assert claim["pndm"]["steps"] == 6 and claim["pndm"]["nfe"] == 7
    default = claim["rows"]["sidestep, default"]
    assert default["holds"] == (
        default["latent_rms"] <= claim["pndm"]["latent_rms"]
        and default["psnr"] >= claim["pndm"]["psnr"]
    )
    suite.print_report(document)
    assert "PNDMScheduler" in capsys.readouterr().out
    figure = suite.chart(document)
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert sorted(labels) == ["ddim", "dpmsolver++2m"]
