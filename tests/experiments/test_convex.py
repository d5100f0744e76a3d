"""EMA-Nesterov on convex problems, against the theory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_ema_nesterov.experiments import convex


@pytest.mark.slow
def test_convex_rates_are_those_of_the_theory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, with fewer problems and less noise to average."""
    monkeypatch.setattr(convex, "CONDITIONS", (100.0,))
    monkeypatch.setattr(convex, "NUM_NOISY_STEPS", 600)
    results = convex.run_convex(tmp_path / "convex.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "convex.jsonl").read_text().splitlines()]
    assert [line["measured"] for line in lines] == [result.measured for result in results]
    by_key = {(r.problem, r.ema_decay): r for r in results}
    for (problem, ema_decay), found in by_key.items():
        if found.expected is not None:
            # Two equal eigenvalues: the distance shrinks like t (1 - s)^t, a little later.
            assert found.measured == pytest.approx(found.expected, abs=0.02)
            if problem == "quadratic" and ema_decay is not None:
                descent = by_key["quadratic", None].measured
                assert found.measured < descent - 0.015  # faster than gradient descent
    floors = [by_key["noisy quadratic", ema_decay].measured for ema_decay in (None, 0.9, 0.5, 0.0)]
    assert floors[0] == 1.0
    assert floors == sorted(floors)  # the shorter the memory, the more of the noise
    table = capsys.readouterr().out
    assert "noisy quadratic" in table
    assert all(f"{r.expected:.4f}" in table for r in results if r.expected is not None)
    with pytest.raises(ValueError, match="ema_decay must be in"):
        convex.convex_step_size(10.0, 0.95)
