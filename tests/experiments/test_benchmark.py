"""The benchmark measures what it says, and the method makes no large tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_ema_nesterov.cli import main
from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.experiments.benchmark import measure as cost
from lightning_ema_nesterov.experiments.benchmark import run
from lightning_ema_nesterov.experiments.benchmark.average import measure_averages
from lightning_ema_nesterov.experiments.benchmark.measure import FORMS, measure_cost

SIZE = 2**21  # blocks are small beside it

# Most bytes that are held at once, over those of the parameters: the copy of the lookahead point,
# and a few blocks of 2 ** 17 elements.
PEAKS = {"default": 0.0, "compile": 0.001, "one_pass": 0.001, "bfloat16": 1.6, "int8": 1.8}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_state_and_peak_of_each_form(form: str) -> None:
    found = measure_cost(SIZE, 3, form=form, num_rounds=1)
    assert SIZE - 1024 <= found.num_elements <= SIZE
    expected = {"bfloat16": 0.5, "int8": 0.25 + 1 / 128}
    assert found.state_per_element == expected.get(form, 1.0)
    assert found.peak_per_element <= PEAKS[form]
    assert (found.peak_per_element >= 1.0) == (form in ("bfloat16", "int8"))
    times = [found.method_ms, found.straightforward_ms, found.copy_ms, found.adamw_ms]
    assert min(times) > 0


def test_averages_of_the_weights_side_by_side() -> None:
    """Ours has no second model, and copies the parameters where someone evaluates."""
    ours, theirs = measure_averages(SIZE, 3, num_rounds=1)
    assert [ours.name, theirs.name] == ["EMANesterov", "EMAWeightAveraging"]
    assert (ours.state_per_element, theirs.state_per_element) == (1.0, 1.0)
    assert ours.evaluating_per_element == pytest.approx(1.0, abs=1e-3)
    assert theirs.evaluating_per_element < 0.8  # two tensors at once
    for found in (ours, theirs):
        assert min(found.step_ms, found.enter_ms, found.leave_ms) > 0


def test_transients_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    extrapolate = Lookahead.extrapolate

    def wasteful(self: Lookahead) -> None:
        extrapolate(self)
        [p] = self.base_optimizer.param_groups[0]["params"]
        held = torch.cat([p.detach(), p.detach()])
        torch.cat([p.detach(), held])  # 2 and 3 at once

    monkeypatch.setattr(Lookahead, "extrapolate", wasteful)
    assert measure_cost(3000, 1, num_rounds=1).peak_per_element == 5.0


def test_straightforward_form_has_the_same_numbers() -> None:
    """Both at rest: the direction decays, and the parameters move along it."""
    actions, lookahead = cost._prepare([(100,)], "default", "cpu")
    lookahead.attach()
    [p] = lookahead.base_optimizer.param_groups[0]["params"]
    twin = cost._Straightforward([p.detach().clone()])
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


@pytest.mark.slow
def test_command_prints_a_table_and_writes_the_figures(tmp_path: Path) -> None:
    arguments = ["--num_elements", "2000", "--num_tensors", "[2, 5]", "--num_rounds", "1"]
    arguments += ["--forms", "[default, bfloat16]", "--num_threads", "[1, 2]"]
    command = [sys.executable, "-m", "lightning_ema_nesterov.cli", "benchmark"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    result = subprocess.run([*command, *arguments], **options)  # type: ignore[call-overload]
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert len(figures["costs"]) == 2 * 2 * 2
    printed = " ".join(result.stdout.split())
    for row in figures["costs"]:
        ratio = row["method_over_straightforward"]
        assert ratio == pytest.approx(row["method_ms"] / row["straightforward_ms"])  # one round
        cells = f"{row['form']} {row['num_elements']:,} {row['num_tensors']} {row['num_threads']} "
        assert f"{cells}{ratio:.2f} " in printed
    assert {row["num_threads"] for row in figures["costs"]} == {1, 2}
    assert len(figures["averages"]) == 2 * 2 * 2  # each with Lightning's beside it
    for row in figures["averages"]:
        cells = f"{row['name']} {row['num_elements']:,} {row['num_tensors']} {row['num_threads']} "
        assert f"{cells}1.000 {row['evaluating_per_element']:.3f} " in printed
    assert list(figures["us_per_tensor"]) == ["default", "bfloat16"]
    assert f"default: {figures['us_per_tensor']['default']:.1f} us for each" in printed


def test_single_numbers_and_names_are_lists_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the default numbers of tensors, those that the elements can be split into."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--num_elements", "1000", "--num_threads", "1", "--num_rounds", "1"]
    arguments += ["--forms", "default"]
    monkeypatch.setattr(sys, "argv", ["ema-nesterov", "benchmark", *arguments])
    main()
    costs = json.loads((tmp_path / "out/benchmark.json").read_text())["costs"]
    assert [(c["form"], c["num_threads"], c["num_tensors"]) for c in costs] == [
        ("default", 1, 10),
        ("default", 1, 100),
    ]
    assert "Figures: out/benchmark.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_threads", "0"], "num_threads must be at least 1, got [0]"),
        (["--num_elements", "1", "--num_tensors", "2"], "num_elements must be at least 2 * num_t"),
        # What comes before it is not measured in vain.
        (["--forms", "[default, fast]"], "form must be one of default, compile, one_pass"),
        (["--device", "cuda:17"], "device must be one that torch finds here, got 'cuda:17': "),
        (["--device", "gpu"], "device must be one that torch finds here, got 'gpu': "),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(run, "measure_cost", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ema-nesterov", "benchmark", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert str(end.value).startswith(f"ema-nesterov: {message}")
    assert "\n" not in str(end.value)
    assert not list(tmp_path.iterdir())
