"""The benchmark measures what it says, and the method makes no large tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from lightning_ema_nesterov.cli import main
from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.experiments.benchmark import measure as cost
from lightning_ema_nesterov.experiments.benchmark import run
from lightning_ema_nesterov.experiments.benchmark.average import measure_averages
from lightning_ema_nesterov.experiments.benchmark.measure import FORMS, measure_cost
from lightning_ema_nesterov.experiments.benchmark.model_step import (
    MODELS,
    ModelCost,
    measure_model,
)

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


MATRICES = [(256, 64)] * 2 + [(192, 64), (64, 64), (192, 64), (192, 64), (64, 192)] * 2
NUM_OTHERS = 5 * 64  # the norms


def bytes_of_direction(form: str) -> int:
    if form == "int8":
        scales = [4 * rows * -(-columns // 128) for rows, columns in MATRICES]
        return 4 * NUM_OTHERS + sum(rows * columns for rows, columns in MATRICES) + sum(scales)
    per_element = {"default": 4, "bfloat16": 2}[form]
    return per_element * (NUM_OTHERS + sum(rows * columns for rows, columns in MATRICES))


@pytest.mark.slow
def test_training_step_of_a_model_with_and_without_the_method() -> None:
    forms = ("default", "bfloat16", "int8")
    found = list(measure_model("0.1M", forms=forms, num_rounds=2, batch_size=1))
    assert [row.form for row in found] == list(forms)
    for row in found:
        num_params, gib = row.num_elements, 2.0**30
        assert num_params == NUM_OTHERS + sum(rows * columns for rows, columns in MATRICES)
        assert (row.num_tokens, row.is_compiled) == (64, False)
        # AdamW has two tensors of each parameter, and a count of steps in float32.
        own = row.state_gib * gib
        assert 8 * num_params < own < 8 * num_params + 100
        added = row.state_with_method_gib * gib - own
        assert added == pytest.approx(bytes_of_direction(row.form), abs=1)
        # Parameters and gradients beside it; the compressed forms copy parameters too.
        assert row.peak_gib * gib > own + 8 * num_params
        assert row.peak_with_method_gib > row.peak_gib
        assert min(row.method_ms, row.step_ms, row.step_with_method_ms) > 0
        assert row.method_ms / row.step_ms / 3 < row.share < 3 * row.method_ms / row.step_ms


@pytest.mark.parametrize(
    ("name", "recipe"), [("124M", "gpt2-124m"), ("350M", "llama-350m"), ("1B", "llama-1b")]
)
def test_models_are_those_of_the_recipes(name: str, recipe: str) -> None:
    file = Path(__file__).parents[2] / "recipes" / recipe / "base.yaml"
    model: dict[str, object] = yaml.safe_load(file.read_text())["model_config"]
    del model["name"]
    model.pop("gelu_approximate", None)  # as LitGPT has it by default
    assert MODELS[name] == model


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], []),
        (["--device", "cuda"], ["124M", "350M", "1B"]),
        (["--device", "cuda", "--models", "350M"], ["350M"]),
        (["--models", "[0.1M]"], ["0.1M"]),
    ],
)
def test_models_are_measured_on_a_gpu_and_where_they_are_asked_for(
    arguments: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(run, "run_benchmark", lambda *_, models, **__: asked.append(models))
    monkeypatch.setattr(sys, "argv", ["ema-nesterov", "benchmark", *arguments])
    main()
    assert asked == [expected]


def test_table_of_models_is_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cost = ModelCost("0.1M", "int8", 139_584, 64, False, 2.0, 2.5, 0.25, 0.125, 0.5, 0.75, 1.0, 1.5)
    monkeypatch.setattr(run, "measure_model", lambda *_, **__: iter([cost]))
    monkeypatch.chdir(tmp_path)
    arguments = ["--num_elements", "1000", "--num_tensors", "2", "--num_rounds", "1"]
    arguments += ["--forms", "default", "--models", "0.1M"]
    monkeypatch.setattr(sys, "argv", ["ema-nesterov", "benchmark", *arguments])
    main()
    [row] = json.loads((tmp_path / "out/benchmark.json").read_text())["models"]
    assert row == asdict(cost)
    printed = " ".join(capsys.readouterr().out.split())
    assert "0.1M int8 139,584 64 2.0 to 2.5 ms 0.25 ms 12.50 % 0.50 to 0.75 GiB 1.00 to" in printed
    assert "parameters and directions: " in printed


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
        (["--models", "[124M, 2B]"], "models must be of 0.1M, 124M, 350M, 1B, got '2B'."),
        (["--models", "0.1M", "--batch_size", "0"], "batch_size must be at least 1, got 0."),
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
    monkeypatch.setattr(run, "measure_model", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ema-nesterov", "benchmark", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert str(end.value).startswith(f"ema-nesterov: {message}")
    assert "\n" not in str(end.value)
    assert not list(tmp_path.iterdir())
