"""Train the same small language model with and without EMA-Nesterov, and compare."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_ema_nesterov.callback import EMANesterov
from lightning_ema_nesterov.quickstart.corpus import Corpus, evenly_spaced, load_corpus, shuffled
from lightning_ema_nesterov.quickstart.model import ByteLanguageModel
from lightning_ema_nesterov.report import compare, draw_curves, format_table, read_scalars

__all__ = ["Settings", "run_quickstart"]

WINDOW_SIZE = 64
BATCH_SIZE = 32
NUM_VALIDATION_WINDOWS = 640
NUM_VALIDATIONS = 20
BASELINE, TREATED = "adamw", "adamw_ema_nesterov"


@dataclass(frozen=True)
class Settings:
    """What both runs share, and the two numbers of EMA-Nesterov."""

    num_steps: int
    seed: int
    lr: float
    lookahead_step_size: float
    ema_decay: float


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
        _train(settings, corpus, run_dir / name, callbacks)
    _report(settings, corpus, run_dir)
    return run_dir


def _new_folder(out_dir: Path) -> Path:
    taken = [int(path.name[4:]) for path in out_dir.glob("run_*") if path.name[4:].isdecimal()]
    run_dir = out_dir / f"run_{max(taken, default=-1) + 1}"
    run_dir.mkdir(parents=True)
    return run_dir


def _train(
    settings: Settings, corpus: Corpus, log_dir: Path, callbacks: list[Callback]
) -> None:
    seed_everything(settings.seed, verbose=False)
    model = ByteLanguageModel(settings.lr, settings.num_steps, window_size=WINDOW_SIZE)
    logger = TensorBoardLogger(log_dir.parent, log_dir.name, version="", default_hp_metric=False)
    validate_every = max(1, settings.num_steps // NUM_VALIDATIONS)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=settings.num_steps,
        max_epochs=1,
        val_check_interval=validate_every,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        log_every_n_steps=min(10, settings.num_steps),
        logger=logger,
        callbacks=[
            *callbacks,
            LearningRateMonitor("step"),
            ModelCheckpoint(
                log_dir / "checkpoints",
                filename="{step}",
                every_n_train_steps=validate_every,
                save_on_exception=True,
            ),
        ],
        enable_model_summary=False,
    )
    train = shuffled(
        corpus.train,
        window_size=WINDOW_SIZE,
        num_windows=settings.num_steps * BATCH_SIZE,
        seed=settings.seed,
    )
    held_out = evenly_spaced(
        corpus.validation, window_size=WINDOW_SIZE, num_windows=NUM_VALIDATION_WINDOWS
    )
    val_loader = DataLoader(held_out, batch_size=4 * BATCH_SIZE)
    with _without_advice():
        trainer.fit(model, DataLoader(train, batch_size=BATCH_SIZE), val_loader)
        if settings.num_steps % validate_every:
            trainer.validate(model, val_loader, verbose=False)
    trainer.save_checkpoint(log_dir / "final.ckpt")
    hyperparameters = {**asdict(settings), "ema_nesterov": bool(callbacks)}
    logger.log_hyperparams(
        hyperparameters, {"hp/val_loss": trainer.callback_metrics["val_loss"].item()}
    )
    logger.finalize("success")


def _report(settings: Settings, corpus: Corpus, run_dir: Path) -> None:
    baseline, treated = (read_scalars(run_dir / name, "val_loss") for name in (BASELINE, TREATED))
    result = compare(baseline, treated)
    reached_step, reached_seconds = (
        ("never", "never")
        if result.steps_to_baseline_final is None
        else (str(result.steps_to_baseline_final), f"{result.seconds_to_baseline_final:.0f}")
    )
    table = format_table(
        [
            ["run", "final loss", "best loss", "steps to baseline's final", "seconds to it"],
            [
                BASELINE,
                f"{result.baseline_final:.4f}",
                f"{result.baseline_best:.4f}",
                str(result.baseline_steps),
                f"{result.baseline_seconds:.0f}",
            ],
            [TREATED, f"{result.final:.4f}", f"{result.best:.4f}", reached_step, reached_seconds],
        ]
    )
    curves = run_dir / "curves.png"
    draw_curves(
        curves,
        baseline,
        treated,
        labels=("AdamW", "AdamW with EMA-Nesterov"),
        lookahead=read_scalars(run_dir / TREATED, "ema_nesterov/step_size"),
        title=f"Quickstart, learning rate {settings.lr:g}, seed {settings.seed}",
    )
    results: dict[str, Any] = {
        "settings": asdict(settings),
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "train_sha256": corpus.split["train_sha256"],
        "validation_sha256": corpus.split["validation_sha256"],
        "comparison": asdict(result),
        "val_loss": {
            name: [[point.step, point.value] for point in points]
            for name, points in ((BASELINE, baseline), (TREATED, treated))
        },
    }
    (run_dir / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\nValidation loss in nats per byte\n\n{table}\n\nCurves: {curves}")
    print(f"Logs: tensorboard --logdir {run_dir}")


class _without_advice(warnings.catch_warnings):  # noqa: N801
    """Silence Lightning's advice on data loader workers and its device banner."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
        return entered
