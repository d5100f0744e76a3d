"""Train the same small language model with and without EMA-Nesterov, and compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_ema_nesterov.callback import EMANesterov
from lightning_ema_nesterov.experiments.advice import without_advice
from lightning_ema_nesterov.experiments.event_files import (
    Comparison,
    compare,
    draw_curves,
    format_table,
    read_scalar,
)
from lightning_ema_nesterov.experiments.model import ByteLanguageModel
from lightning_ema_nesterov.litgpt.data.corpus import Corpus, load_corpus
from lightning_ema_nesterov.litgpt.data.windows import evenly_spaced, shuffled

__all__ = ["Settings", "run_quickstart"]

WINDOW_SIZE = 64
VALIDATION_BATCH_SIZE = 128
NUM_VALIDATION_WINDOWS = 640
NUM_VALIDATIONS = 20
BASE_RECIPE, TREATED_RECIPE = (
    f"recipes/quickstart/{name}.yaml" for name in ("base", "ema_nesterov")
)
BASELINE, TREATED = "adamw", "adamw_ema_nesterov"


@dataclass(frozen=True)
class Settings:
    """What both runs share, and the two numbers of EMA-Nesterov.

    Args:
        num_steps: Optimizer steps of each run, a positive multiple of 20.
        seed: Seed of the weights and of the order of the text.
        lr: Peak base learning rate, above 0.
        lookahead_step_size: Peak lookahead step size, in [0, 1).
        ema_decay: Weight of the past in the EMA direction, in [0, 1).
        batch_size: Windows of text in a batch, at least 1.

    Raises:
        ValueError: If ``num_steps``, ``lr`` or ``batch_size`` is out of its range.
    """

    num_steps: int
    seed: int
    lr: float
    lookahead_step_size: float
    ema_decay: float
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.num_steps < NUM_VALIDATIONS or self.num_steps % NUM_VALIDATIONS:
            raise ValueError(
                f"num_steps must be a positive multiple of {NUM_VALIDATIONS}, the number of "
                f"validations, got {self.num_steps}."
            )
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")


def run_quickstart(settings: Settings, *, out_dir: Path, text: Path | None = None) -> Path:
    """Train both runs, print the comparison, and draw the curves.

    Args:
        settings: What to train.
        out_dir: Folder in which a new folder ``run_N`` is made.
        text: A file or folder to train on. ``None``: the standard library of the running Python.

    Returns:
        The new folder, with one folder of TensorBoard logs for each run, ``curves.png``,
        ``results.json`` and ``split.json``.
    """
    callback = EMANesterov(settings.lookahead_step_size, settings.ema_decay)
    corpus = load_corpus(text, window_size=WINDOW_SIZE)
    run_dir = _new_folder(out_dir)
    (run_dir / "split.json").write_text(json.dumps(corpus.split, indent=1))
    print(
        f"Text: {corpus.split['source']}, {len(corpus.train) / 1e6:.1f} MB to train on, "
        f"{len(corpus.validation) / 1e6:.1f} MB held out."
    )
    print(f"Logs: {run_dir}\nWatch: tensorboard --logdir {run_dir}")
    for name, callbacks in ((BASELINE, []), (TREATED, [callback])):
        print(f"\n{name}: {settings.num_steps} optimizer steps")
        with without_advice():
            _train(settings, corpus, run_dir / name, callbacks)
    _report(settings, corpus, run_dir)
    return run_dir


def _new_folder(out_dir: Path) -> Path:
    taken = [int(path.name[4:]) for path in out_dir.glob("run_*") if path.name[4:].isdecimal()]
    run_dir = out_dir / f"run_{max(taken, default=-1) + 1}"
    run_dir.mkdir(parents=True)
    return run_dir


def _train(
    settings: Settings, corpus: Corpus, log_dir: Path, callbacks: Sequence[Callback]
) -> None:
    seed_everything(settings.seed, verbose=False)
    model = ByteLanguageModel(settings.lr, settings.num_steps, window_size=WINDOW_SIZE)
    train = shuffled(
        corpus.train,
        window_size=WINDOW_SIZE,
        num_windows=settings.num_steps * settings.batch_size,
        seed=settings.seed,
    )
    held_out = evenly_spaced(
        corpus.validation, window_size=WINDOW_SIZE, num_windows=NUM_VALIDATION_WINDOWS
    )
    trainer = _make_trainer(settings, log_dir, callbacks)
    trainer.fit(
        model,
        DataLoader(train, batch_size=settings.batch_size),
        DataLoader(held_out, batch_size=VALIDATION_BATCH_SIZE),
    )
    trainer.save_checkpoint(log_dir / "final.ckpt")
    # What the run did: the baseline does not look ahead.
    step_size = settings.lookahead_step_size if callbacks else 0.0
    for logger in trainer.loggers:
        logger.log_hyperparams(
            {**asdict(settings), "lookahead_step_size": step_size},
            {"hp/val_loss": trainer.callback_metrics["val_loss"].item()},
        )
        logger.finalize("success")


def _make_trainer(settings: Settings, log_dir: Path, callbacks: Sequence[Callback]) -> Trainer:
    validate_every = settings.num_steps // NUM_VALIDATIONS
    checkpoint = ModelCheckpoint(
        log_dir / "checkpoints",
        filename="{step}",
        every_n_train_steps=validate_every,
        save_on_exception=True,
    )
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=settings.num_steps,
        max_epochs=1,
        val_check_interval=validate_every,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        log_every_n_steps=min(10, validate_every),
        logger=TensorBoardLogger(log_dir.parent, log_dir.name, version="", default_hp_metric=False),
        callbacks=[*callbacks, LearningRateMonitor("step"), checkpoint],
        enable_model_summary=False,
    )


def _report(settings: Settings, corpus: Corpus, run_dir: Path) -> None:
    baseline, treated = (read_scalar(run_dir / name, "val_loss") for name in (BASELINE, TREATED))
    comparison = compare(baseline, treated)
    curves = run_dir / "curves.png"
    draw_curves(
        curves,
        baseline,
        treated,
        labels=("AdamW", "AdamW with EMA-Nesterov"),
        lookahead=read_scalar(run_dir / TREATED, "ema_nesterov/step_size"),
        title=f"Quickstart, learning rate {settings.lr:g}, seed {settings.seed}",
    )
    results: dict[str, Any] = {
        "settings": asdict(settings),
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "train_sha256": corpus.split["train_sha256"],
        "validation_sha256": corpus.split["validation_sha256"],
        "comparison": asdict(comparison),
        "val_loss": {
            name: [[point.step, point.value] for point in points]
            for name, points in ((BASELINE, baseline), (TREATED, treated))
        },
    }
    (run_dir / "results.json").write_text(json.dumps(results))
    print(f"\nValidation loss in nats per byte\n\n{_table(comparison)}\n\nCurves: {curves}")
    print(f"Logs: tensorboard --logdir {run_dir}")
    print(f"With LitGPT: litgpt pretrain --config {BASE_RECIPE} --config {TREATED_RECIPE}")


def _table(result: Comparison) -> str:
    reached = (
        ("never", "never")
        if result.steps_to_baseline_final is None
        else (str(result.steps_to_baseline_final), f"{result.seconds_to_baseline_final:.0f}")
    )
    return format_table(
        [
            ["run", "final loss", "best loss", "steps to baseline's final", "seconds to it"],
            [
                BASELINE,
                f"{result.baseline_final:.4f}",
                f"{result.baseline_best:.4f}",
                str(result.baseline_steps),
                f"{result.baseline_seconds:.0f}",
            ],
            [TREATED, f"{result.final:.4f}", f"{result.best:.4f}", *reached],
        ]
    )
