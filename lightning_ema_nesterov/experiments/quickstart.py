"""A study of one seed: the same small language model with and without EMA-Nesterov."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_ema_nesterov.experiments.study.check import check_study
from lightning_ema_nesterov.experiments.study.claim import claim
from lightning_ema_nesterov.experiments.study.compare import RUNS
from lightning_ema_nesterov.experiments.study.figures import draw_curves, styles_of
from lightning_ema_nesterov.experiments.study.results import (
    Result,
    read_event_folder,
    reading_at,
    with_averages,
)
from lightning_ema_nesterov.experiments.study.spec import (
    BASELINE,
    BaseOptimizer,
    ClassSpec,
    MethodSpec,
    Run,
    Study,
)
from lightning_ema_nesterov.experiments.study.tables import standings
from lightning_ema_nesterov.experiments.study.train import train_run
from lightning_ema_nesterov.experiments.tables import format_table
from lightning_ema_nesterov.experiments.typed_commands import typed_command
from lightning_ema_nesterov.litgpt.data.corpus import load_corpus

__all__ = ["Settings", "make_study", "run_quickstart"]

WINDOW_SIZE = 64
NUM_VALIDATION_WINDOWS = 640
NUM_VALIDATIONS = 20
RECIPES = [f"recipes/quickstart/{name}.yaml" for name in ("base", "ema_nesterov")]
BASE, TREATED = "adamw", "ema_nesterov"
AVERAGE = reading_at(TREATED, 1.0)
_RECORDED = ("adamw", "adamw_ema_nesterov", "adamw_ema_nesterov_average")


@dataclass(frozen=True)
class Settings:
    """What both runs share, and the two numbers of EMA-Nesterov.

    Args:
        num_steps: Optimizer steps of each run, a positive multiple of 20.
        seed: Seed of the weights and of the order of the text, in [0, 2 ** 32).
        lr: Peak base learning rate, above 0.
        lookahead_step_size: Peak lookahead step size, as for EMANesterov.
        ema_decay: Weight of the past in the EMA direction, in [0, 1).
        batch_size: Windows of text in a batch, at least 1.
        num_threads: Threads of torch, at least 1.

    Raises:
        ValueError: If one of them is out of its range; those of EMANesterov are checked later.
    """

    num_steps: int
    seed: int
    lr: float
    lookahead_step_size: float
    ema_decay: float
    batch_size: int = 8
    num_threads: int = 1

    def __post_init__(self) -> None:
        if self.num_steps < NUM_VALIDATIONS or self.num_steps % NUM_VALIDATIONS:
            raise ValueError(
                f"num_steps must be a positive multiple of {NUM_VALIDATIONS}, the number of "
                f"validations, got {self.num_steps}."
            )
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2 ** 32), got {self.seed}.")
        for name in ("batch_size", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def make_study(settings: Settings, text: Path | None = None) -> Study:
    """Return the quickstart as a study.

    Args:
        settings: What to train.
        text: A file or folder to train on. ``None``: the standard library of the running Python.
    """
    data = {
        "text": None if text is None else str(text),
        "window_size": WINDOW_SIZE,
        "batch_size": settings.batch_size,
        "num_validation_windows": NUM_VALIDATION_WINDOWS,
    }
    method = {
        "lookahead_step_size": settings.lookahead_step_size,
        "ema_decay": settings.ema_decay,
    }
    experiments = __name__.rpartition(".")[0]
    lr_monitor = "lightning.pytorch.callbacks.LearningRateMonitor"
    return Study(
        model=ClassSpec(f"{experiments}.model.ByteDecoder", {"window_size": WINDOW_SIZE}),
        data=ClassSpec(f"{experiments}.data.TextWindows", data),
        num_steps=settings.num_steps,
        num_validations=NUM_VALIDATIONS,
        base_optimizers={
            BASE: BaseOptimizer(
                "torch.optim.AdamW", [settings.lr], {"betas": [0.9, 0.95], "weight_decay": 0.1}
            )
        },
        methods={BASELINE: MethodSpec(), TREATED: MethodSpec("EMANesterov", method)},
        seeds=[settings.seed],
        average_shares=[1.0] if settings.ema_decay else [],
        callbacks=[ClassSpec(lr_monitor, {"logging_interval": "step"})],
        num_threads=settings.num_threads,
    )


def run_quickstart(settings: Settings, *, out_dir: Path, text: Path | None = None) -> Path:
    """Train both runs, print the comparison, and draw the curves.

    Args:
        settings: What to train.
        out_dir: Folder in which a new folder ``run_N`` is made.
        text: A file or folder to train on. ``None``: the standard library of the running Python.

    Returns:
        The new folder: that of a study, with ``curves.png``, ``results.json`` and ``split.json``.

    Raises:
        ValueError: If a setting is out of its range, or the text is too short.
    """
    study = make_study(settings, text)
    check_study(study)
    split = load_corpus(text, window_size=WINDOW_SIZE).split
    run_dir = _new_folder(out_dir)
    claim(study, run_dir)
    (run_dir / "split.json").write_text(json.dumps(split, indent=1))
    print(_introduction(settings, split, run_dir))
    results: list[Result] = []
    for method in study.methods:
        run = Run(BASE, method, settings.lr, settings.seed)
        print(f"\n{_name(method)}: {settings.num_steps:,} optimizer steps")
        try:
            train_run(study, run, run_dir / RUNS, is_watched=True)
        except (KeyboardInterrupt, SystemExit):  # the latter is the Trainer's answer to Ctrl-C
            sys.exit(f"Stopped. Logs and checkpoints up to here: {run_dir}")
        results.append(read_event_folder(run_dir / RUNS / run.folder))
    _report(settings, split, with_averages(results), run_dir)
    return run_dir


def _new_folder(out_dir: Path) -> Path:
    taken = [int(path.name[4:]) for path in out_dir.glob("run_*") if path.name[4:].isdecimal()]
    run_dir = out_dir / f"run_{max(taken, default=-1) + 1}"
    run_dir.mkdir(parents=True)
    return run_dir


def _name(method: str) -> str:
    names = {
        BASELINE: "AdamW",
        TREATED: "AdamW with EMA-Nesterov",
        AVERAGE: "average of its weights",
    }
    return names.get(method, method)


def _introduction(settings: Settings, split: dict[str, Any], run_dir: Path) -> str:
    # What a step took on one core of an AMD EPYC, validation included.
    step_ms = 5.0 + 1.1 * settings.batch_size
    minutes = max(1, round(2 * settings.num_steps * step_ms / 60_000))
    threads = "1 thread" if settings.num_threads == 1 else f"{settings.num_threads} threads"
    return (
        f"Text: {split['source']}, {split['train_bytes'] / 1e6:.1f} MB to train on, "
        f"{split['validation_bytes'] / 1e6:.1f} MB held out.\n"
        f"Two runs of {settings.num_steps:,} steps with {threads}: about {minutes} min on one core "
        "of a server, a few times as long where cores are slow or shared.\n"
        f"Logs: {run_dir}\nWatch: {typed_command('tensorboard', '--logdir', run_dir)}"
    )


def _report(
    settings: Settings,
    split: dict[str, Any],
    results: list[Result],
    run_dir: Path,
) -> None:
    baseline, treated, *averages = results
    reached = standings(results, BASE)[1].steps_to_target
    seconds = next((p.seconds for p in treated.val_loss if p.step == reached), None)
    comparison = {
        "baseline_final": baseline.final,
        "baseline_best": baseline.best,
        "final": treated.final,
        "best": treated.best,
        "baseline_steps": baseline.val_loss[-1].step if baseline.val_loss else None,
        "baseline_seconds": baseline.val_loss[-1].seconds if baseline.val_loss else None,
        "steps_to_baseline_final": reached,
        "seconds_to_baseline_final": seconds,
    }
    record = {
        "settings": asdict(settings),
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "train_sha256": split["train_sha256"],
        "validation_sha256": split["validation_sha256"],
        "comparison": comparison,
        "val_loss": {
            name: [[point.step, point.value] for point in result.val_loss]
            for name, result in zip(_RECORDED, results, strict=False)
        },
    }
    (run_dir / "results.json").write_text(json.dumps(record))
    curves = run_dir / "curves.png"
    _draw(curves, results, settings)
    print(f"\nValidation loss in nats per byte\n\n{_table(comparison)}\n")
    print(_in_words(comparison, settings))
    if averages and math.isfinite(treated.final):
        print(_average_in_words(treated, averages[0], settings.num_steps))
    print(f"\nCurves: {curves}\nLogs: {typed_command('tensorboard', '--logdir', run_dir)}")
    if all(map(Path.exists, map(Path, RECIPES))):
        options = [word for path in RECIPES for word in ("--config", path)]
        print(f"A larger model with LitGPT: {typed_command('litgpt', 'pretrain', *options)}")


def _draw(path: Path, results: list[Result], settings: Settings) -> None:
    found = [dataclasses.replace(s, method=_name(s.method)) for s in standings(results, BASE)]
    styles = styles_of([BASELINE, TREATED])
    styles[AVERAGE] = {**styles[TREATED], "linestyle": "--"}
    draw_curves(
        path,
        found,
        {_name(method): style for method, style in styles.items()},
        title=f"Quickstart, batch {settings.batch_size}, seed {settings.seed}",
        shaded=found[1],
    )


def _table(comparison: dict[str, Any]) -> str:
    def cells(name: str, prefix: str, steps: int | None, seconds: float | None) -> list[str]:
        losses = [f"{comparison[prefix + key]:.4f}" for key in ("final", "best")]
        reached = ["never", "never"] if seconds is None else [str(steps), f"{seconds:.0f}"]
        return [name, *losses, *reached]

    c = comparison
    return format_table(
        [
            ["run", "final loss", "best loss", "steps to AdamW's final", "seconds to it"],
            cells("AdamW", "baseline_", c["baseline_steps"], c["baseline_seconds"]),
            cells(
                "AdamW with EMA-Nesterov",
                "",
                c["steps_to_baseline_final"],
                c["seconds_to_baseline_final"],
            ),
        ]
    )


def _average_in_words(treated: Result, average: Result, num_steps: int) -> str:
    last_flat_step = round((1.0 - Study.lr_decay) * num_steps)
    pairs = zip(treated.val_loss, average.val_loss, strict=False)
    before = [(x, a) for x, a in pairs if x.step <= last_flat_step]
    if not before:
        return ""
    at_x, at_average = before[-1]
    return (
        f"At step {at_x.step:,}, before the learning rate falls, its loss is {at_x.value:.4f} at "
        f"the weights and {at_average.value:.4f} at their average."
    )


def _in_words(comparison: dict[str, Any], settings: Settings) -> str:
    baseline, final = comparison["baseline_final"], comparison["final"]
    if not math.isfinite(baseline) or not math.isfinite(final):
        diverged = [n for n, v in ((BASELINE, baseline), (TREATED, final)) if not math.isfinite(v)]
        return f"{' and '.join(map(_name, diverged))} diverged. Try a smaller --lr."
    gap = final - baseline
    if gap == 0:
        return "Both end at the same loss."
    steps = comparison["steps_to_baseline_final"]
    reached = "does not reach AdamW's final loss"
    if steps is not None:
        reached = f"reaches AdamW's final loss after {steps:,} of {settings.num_steps:,} steps"
    return (
        f"With EMA-Nesterov the final loss is {abs(gap):.4f} nats per byte "
        f"({abs(gap) / baseline:.1%}) {'lower' if gap < 0 else 'higher'} than with AdamW alone, "
        f"and it {reached}.\nThis is one seed; --seed {settings.seed + 1} trains another. "
        "recipes/quickstart/README.md has several."
    )
