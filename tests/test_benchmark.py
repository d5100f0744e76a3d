"""The benchmark measures what it says, and the method makes no large tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_ema_nesterov import benchmark
from lightning_ema_nesterov.benchmark import measure_cost
from lightning_ema_nesterov.lookahead import Lookahead


def test_method_keeps_one_element_and_makes_no_tensor() -> None:
    cost = measure_cost(3000, 3, num_rounds=1)
    assert cost.num_elements == 3000
    assert cost.state_per_element == 1.0
    assert cost.largest_transient == 0.0
    assert min(cost.method_ms, cost.straightforward_ms, cost.copy_ms, cost.adamw_ms) > 0


def test_transients_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    extrapolate = Lookahead.extrapolate

    def wasteful(self: Lookahead) -> None:
        extrapolate(self)
        for p in self.base_optimizer.param_groups[0]["params"]:
            torch.cat([p.detach(), p.detach()])

    monkeypatch.setattr(Lookahead, "extrapolate", wasteful)
    assert measure_cost(3000, 3, num_rounds=1).largest_transient == 2.0


def test_straightforward_form_has_the_same_numbers() -> None:
    """Both at rest: the direction decays, and the parameters move along it."""
    actions, lookahead = benchmark._prepare(100, 1, "cpu")
    [p] = lookahead.base_optimizer.param_groups[0]["params"]
    twin = benchmark._Straightforward([p.detach().clone()])
    for _ in range(2):
        actions["method"]()
    state = lookahead.base_optimizer.state[p]["ema_nesterov_direction"]
    state.fill_(0.5)
    twin.directions[0].fill_(0.5)
    twin.params[0].copy_(p.detach())
    for _ in range(5):
        actions["method"]()
        twin.step()
    torch.testing.assert_close(p.detach(), twin.params[0])
    torch.testing.assert_close(state, twin.directions[0])
    assert state[0] != 0.5


def test_command_prints_a_table_and_writes_the_figures(tmp_path: Path) -> None:
    arguments = ["--num_elements", "[2000, 4000]", "--num_tensors", "[2]", "--num_rounds", "1"]
    command = [sys.executable, "-m", "lightning_ema_nesterov.cli", "benchmark"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    result = subprocess.run([*command, *arguments], **options)  # type: ignore[call-overload]
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert [cost["num_elements"] for cost in figures["costs"]] == [2000, 4000]
    for cost in figures["costs"]:
        ratio = cost["method_ms"] / cost["straightforward_ms"]
        assert cost["method_over_straightforward"] == ratio
        row = f"{cost['num_elements']:,} 2 {cost['method_ms']:.1f} ms {ratio:.2f} "
        assert row in " ".join(result.stdout.split())
    for wrong in (["--num_threads", "0"], ["--num_elements", "[1]", "--num_tensors", "[2]"]):
        result = subprocess.run([*command, *wrong], **options)  # type: ignore[call-overload]
        assert result.returncode == 1
        assert "must be at least" in result.stderr
        assert "Traceback" not in result.stderr
