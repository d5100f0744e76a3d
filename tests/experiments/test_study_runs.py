"""Which runs a study has, and what they leave behind."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_ema_nesterov.experiments.advice import without_advice
from lightning_ema_nesterov.experiments.study.compare import run_study
from lightning_ema_nesterov.experiments.study.load import load_study
from lightning_ema_nesterov.experiments.study.results import read_events, read_lines
from lightning_ema_nesterov.experiments.study.spec import Run, Study
from tests.experiments.toys import SGD, Model, write


def test_every_combination_is_trained_and_the_baseline_at_the_gain_too(study_dir: Path) -> None:
    runs = {(r.run.base, r.run.method, r.run.lr) for r in read_lines(study_dir / "runs.jsonl")}
    assert runs == {
        # The step size is 0.5, so the baseline is trained at twice each learning rate as well.
        *(("sgd", "none", lr) for lr in (0.05, 0.1, 1e30, 2e30)),
        *(("sgd", "ema", lr) for lr in (0.05, 1e30)),
        *(("adamw", "none", lr) for lr in (0.01, 0.02)),
        ("adamw", "ema", 0.01),
        ("adamw", "free", 0.03),
    }


def test_runs_differ_where_they_should_and_only_there(study_dir: Path) -> None:
    results = {r.run: r for r in read_lines(study_dir / "runs.jsonl")}
    finals = [results[Run("adamw", method, 0.01, 0)].final for method in ("none", "ema")]
    finals += [results[Run("adamw", "none", 0.01, 1)].final]
    finals += [results[Run("adamw", "none", 0.02, 0)].final]
    finals += [results[Run("adamw", "free", 0.03, 0)].final]
    assert len(set(finals)) == len(finals)
    run = results[Run("adamw", "ema", 0.01, 0)]
    assert [point.step for point in run.val_loss] == [5, 10, 15, 20]
    assert run.step_size == 0.5
    assert run.state_per_parameter == 3.0
    assert results[Run("adamw", "none", 0.01, 0)].state_per_parameter == 2.0
    assert run.step_seconds > 0


class RecordsRates(Model):
    """What each step's learning rate was, by run."""

    runs: ClassVar[list[list[float]]] = []

    def on_train_start(self) -> None:
        self.runs.append([])

    def on_train_batch_end(self, *_: Any) -> None:
        [optimizer] = self.trainer.optimizers
        self.runs[-1].append(optimizer.param_groups[0]["lr"])


def test_decay_of_a_method_goes_before_that_of_the_study(tmp_path: Path) -> None:
    RecordsRates.runs.clear()
    model = {"class_path": f"{RecordsRates.__module__}.RecordsRates"}
    ema = {"class_path": "EMANesterov", "init_args": {"ema_decay": 0.9}, "lr_decay": 0.5}
    path = write(
        tmp_path,
        model=model,
        base_optimizers={"sgd": SGD},
        methods={"ema": ema},
        seeds=[0],
        lr_decay=0.25,
        has_gained_baseline=False,
    )
    run_study(load_study(path), tmp_path / "out")
    found = {}
    for run, rates in zip(load_study(path).runs(), RecordsRates.runs, strict=True):
        assert max(rates) == 0.1
        found[run.method] = 20 - 1 - max(idx for idx, rate in enumerate(rates) if rate == 0.1)
    assert found["ema"] == found["none"] + 5


def two_rates(params: Iterable[Tensor], lr: float) -> Optimizer:
    first, *others = params
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": others, "lr": 3 * lr}]
    return torch.optim.SGD(groups, lr=lr)


class Notes(Callback):
    """What a run was given, by run."""

    runs: ClassVar[list[tuple[list[float], int]]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        [optimizer] = trainer.optimizers
        rates = [group["initial_lr"] for group in optimizer.param_groups]
        self.runs.append((rates, torch.get_num_threads()))


def test_run_has_the_callbacks_the_threads_and_the_ratio_of_rates_of_the_study(
    tmp_path: Path,
) -> None:
    Notes.runs.clear()
    num_threads = torch.get_num_threads()
    base = {"class_path": f"{__name__}.two_rates", "init_args": {"lr": 0.01}, "lrs": [0.1, 0.2]}
    path = write(
        tmp_path,
        base_optimizers={"two": base},
        methods={"none": None},
        seeds=[0],
        callbacks=[{"class_path": f"{__name__}.Notes"}],
        num_threads=num_threads + 1,
    )
    try:
        run_study(load_study(path), tmp_path / "out")
    finally:
        torch.set_num_threads(num_threads)
    for (rates, threads), lr in zip(Notes.runs, (0.1, 0.2), strict=True):
        assert rates == pytest.approx([lr, 3 * lr])
        assert threads == num_threads + 1


def test_advice_of_the_trainer_is_silenced_inside_the_block_only() -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        with without_advice():
            assert logger.level == logging.WARNING
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(before)


def test_steps_that_looked_ahead_and_how_far_are_kept_also_backwards(tmp_path: Path) -> None:
    init_args = {"lookahead_step_size": -0.3, "warmup": 6, "rest": 3}
    method = {"class_path": "EMANesterov", "init_args": init_args, "bases": ["sgd"]}
    path = write(tmp_path, methods={"ema": method}, base_optimizers={"sgd": SGD}, seeds=[0])
    run_study(load_study(path), tmp_path / "out")
    found = {r.run.method: r for r in read_lines(tmp_path / "out/runs.jsonl")}
    assert found["ema"].step_size == pytest.approx(-0.3)
    assert found["none"].lookahead_steps is None
    assert found["ema"].lookahead_steps == (7, 17)  # of 1 to 20


def test_diverged_run_is_recorded_and_the_study_goes_on(study_dir: Path) -> None:
    results = read_lines(study_dir / "runs.jsonl")
    diverged = {(r.run.base, r.run.lr) for r in results if r.is_diverged}
    assert diverged == {("sgd", 1e30), ("sgd", 2e30)}
    assert all(math.isinf(r.final) for r in results if r.is_diverged)
    assert len(results) == 20


def test_event_files_alone_hold_what_the_lines_hold(study_dir: Path) -> None:
    lines = {r.run: r for r in read_lines(study_dir / "runs.jsonl")}
    events = {r.run: r for r in read_events(study_dir / "runs")}
    assert set(lines) == set(events)
    for run, line in lines.items():
        event = events[run]
        assert event.is_diverged == line.is_diverged
        assert event.step_size == line.step_size
        assert event.step_seconds == pytest.approx(line.step_seconds, abs=1e-5)
        for found, kept in zip(event.val_loss, line.val_loss, strict=True):
            assert found.step == kept.step
            # Digit for digit: both choose the same learning rates, however small the losses.
            assert np.float32(found.value) == np.float32(kept.value) or math.isnan(found.value)


def test_learning_rates_of_many_digits_have_folders_of_their_own() -> None:
    lrs = [0.002, 0.0023784142, 0.0023784143, 1e-05]
    folders = [Run("sgd", "none", lr, 0).folder for lr in lrs]
    assert len(set(folders)) == len(lrs)
    assert [Run.of_folder(folder).lr for folder in folders] == lrs
    assert folders[0].parts[2] == "lr-0.002"


def test_a_grid_makes_a_method_of_each_combination(tmp_path: Path) -> None:
    grid = {"lookahead_step_size": [0.5, 0.75], "ema_decay": [0.0, 0.9]}
    methods = {"ema": {"class_path": "EMANesterov", "grid": grid}}
    study = load_study(write(tmp_path, methods=methods, base_optimizers={"sgd": SGD}, seeds=[0]))
    assert list(study.methods) == [
        "none",
        "ema[lookahead_step_size=0.5,ema_decay=0.0]",
        "ema[lookahead_step_size=0.5,ema_decay=0.9]",
        "ema[lookahead_step_size=0.75,ema_decay=0.0]",
        "ema[lookahead_step_size=0.75,ema_decay=0.9]",
    ]
    baseline = [run.lr for run in study.runs() if run.method == "none"]
    assert baseline == [0.1, 0.2, 0.4]  # 0.1 / (1 - 0.5) and 0.1 / (1 - 0.75)


def test_study_is_kept_whole_in_its_folder(study_dir: Path) -> None:
    kept = json.loads((study_dir / "study.json").read_text())
    study: Study = load_study(study_dir.parent / "study.yaml")
    assert kept == json.loads(json.dumps(study.as_dict()))


@pytest.mark.parametrize(
    ("init_args", "reason"),
    [
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
        ({"betas": [0.9]}, "list index out of range"),
    ],
)
def test_value_that_an_optimizer_refuses_is_told_with_its_key(
    init_args: dict[str, object], reason: str, tmp_path: Path
) -> None:
    adamw = {"class_path": "torch.optim.AdamW", "init_args": init_args, "lrs": [0.01]}
    study = load_study(write(tmp_path, base_optimizers={"mine": adamw}, methods={"none": None}))
    message = rf"^base_optimizers\.mine \(torch\.optim\.AdamW\) refuses .*: {reason}$"
    with pytest.raises(ValueError, match=message):
        run_study(study, tmp_path / "out")
