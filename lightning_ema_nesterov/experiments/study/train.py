"""One run of a study, as an ordinary run of the Trainer."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.diagnostics import LossAtAverage
from lightning_ema_nesterov.experiments.advice import without_advice
from lightning_ema_nesterov.experiments.study.claim import deciding
from lightning_ema_nesterov.experiments.study.classes import find_class
from lightning_ema_nesterov.experiments.study.spec import BaseOptimizer, ClassSpec, Run, Study
from lightning_ema_nesterov.experiments.study.watch import KeepsLast, StopsAtBatchEnd, Watch
from lightning_ema_nesterov.litgpt.roles import set_step_sizes
from lightning_ema_nesterov.optimizers.from_config import build_optimizer
from lightning_ema_nesterov.optimizers.lr_schedule import WarmupStableDecay

__all__ = ["CHECKPOINT", "check_optimizers", "train_run"]

CHECKPOINT = "unfinished.ckpt"
"""File in the folder of a run that is not finished."""

_DEFINITION = "unfinished.json"
"""File beside it, with what decides the result of that run."""


def check_optimizers(study: Study, runs: Iterable[Run]) -> None:
    """Raise if the optimizer of a run cannot be made for the study's model.

    Some need the roles of parameters, which not every model tells. Without this the first run that
    needs them would fail, after all that come before it.

    Args:
        study: The study.
        runs: Some of its runs.

    Raises:
        ValueError: If one cannot be made; the message names the key.
    """
    made: list[tuple[BaseOptimizer, Mapping[str, float]]] = []
    for run in runs:
        decides = study.optimizer_of(run), study.methods[run.method].lookahead_step_size_by_role
        if decides in made:
            continue
        made.append(decides)
        model = _build(study.model, "model")
        _set_optimizer(model, study, run)
        model.configure_optimizers()


def train_run(study: Study, run: Run, root: Path, *, is_watched: bool = False) -> None:
    """Train one run of a study and write its event file.

    A run whose loss is not finite ends there, and says so in the event file.

    Args:
        study: The study.
        run: One of its runs.
        root: Folder below which the run's folder is made. What is there of it is replaced, unless
            it holds a checkpoint of the same run to go on from.
        is_watched: Whether somebody waits for this run: it shows its progress and keeps
            checkpoints, at each validation, after an exception and at the end.
    """
    torch.set_num_threads(study.num_threads)
    folder = root / run.folder
    checkpoint = folder / CHECKPOINT
    definition, decided = folder / _DEFINITION, deciding(study, run)
    is_resumed = (
        study.has_checkpoints
        and checkpoint.exists()
        and definition.exists()
        and definition.read_text() == decided
    )
    if not is_resumed:
        shutil.rmtree(folder, ignore_errors=True)
    if study.has_checkpoints:
        folder.mkdir(parents=True, exist_ok=True)
        definition.write_text(decided)
    seed_everything(run.seed, verbose=False)
    model = _build(study.model, "model")
    _set_optimizer(model, study, run)
    # Other processes on the machine do not count for a run on its CPU.
    clock = time.process_time if study.accelerator == "cpu" else time.perf_counter
    watch, interrupts = Watch(clock), StopsAtBatchEnd()
    method = study.methods[run.method]
    own = (*study.callbacks, *study.optimizer_of(run).callbacks)
    callbacks = [watch, *(_build(spec, "callbacks") for spec in own)]
    if method.class_path is not None:
        callbacks.append(find_class(method.class_path, "methods")(**method.init_args))
        if study.average_shares and isinstance(callbacks[-1], EMANesterov):
            callbacks.append(LossAtAverage(study.average_shares))
    with interrupts.listening(), without_advice():
        if study.average_shares:  # a method without lookahead is then about the average alone
            warnings.filterwarnings("ignore", "EMANesterov never looks ahead.*")
        trainer = _make_trainer(study, folder, [*callbacks, interrupts], is_watched=is_watched)
        data = _build(study.data, "data")
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint if is_resumed else None)
        if is_watched:
            trainer.save_checkpoint(folder / "final.ckpt")
    watch.write(trainer, _hyperparameters(study, run))
    checkpoint.unlink(missing_ok=True)
    definition.unlink(missing_ok=True)


def _build(spec: ClassSpec, key: str) -> Any:
    return find_class(spec.class_path, key)(**spec.init_args)


def _hyperparameters(study: Study, run: Run) -> dict[str, Any]:
    method = study.methods[run.method]
    own = {
        **asdict(run),
        "num_steps": study.num_steps,
        "lookahead_step_size": method.lookahead_step_size,
    }
    return {
        **own,
        **{name: value for name, value in method.init_args.items() if name not in own},
    }


def _set_optimizer(model: LightningModule, study: Study, run: Run) -> None:
    spec = study.optimizer_of(run)
    schedule = WarmupStableDecay.of_fractions(
        study.num_steps, warmup=study.lr_warmup, decay=study.lr_decay_of(run)
    )

    def configure_optimizers() -> Any:
        optimizer = _make_optimizer(spec, run, model)
        by_role = study.methods[run.method].lookahead_step_size_by_role
        if by_role:
            set_step_sizes(optimizer, model, by_role, argument="lookahead_step_size_by_role")
        scheduler = LambdaLR(optimizer, lambda step_idx: schedule.lr_at(step_idx))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    model.configure_optimizers = configure_optimizers  # type: ignore[method-assign]  # of this one


def _make_optimizer(spec: BaseOptimizer, run: Run, model: nn.Module) -> Optimizer:
    named = {"class_path": spec.class_path, "init_args": spec.init_args}
    key = f"base_optimizers.{run.base}"
    optimizer = build_optimizer(named, model.parameters(), key=key)
    if not optimizer.defaults["lr"] > 0:
        raise ValueError(
            f"The lr in init_args of {spec.class_path} must be above 0: it says how the learning "
            "rates of its groups stand to each other."
        )
    for group in optimizer.param_groups:
        group["lr"] = run.lr * group["lr"] / optimizer.defaults["lr"]
    return optimizer


def _make_trainer(
    study: Study, folder: Path, callbacks: list[Callback], *, is_watched: bool
) -> Trainer:
    validate_every = study.num_steps // study.num_validations
    log_every = max(1, study.num_steps // 50)
    num_batches = study.num_steps * study.accumulate_grad_batches
    if is_watched:
        callbacks = [*callbacks, _make_checkpoint(folder, validate_every)]
    elif study.has_checkpoints:
        callbacks = [*callbacks, KeepsLast(folder / CHECKPOINT)]
    return Trainer(
        accelerator=study.accelerator,
        devices=1,
        precision=study.precision,  # type: ignore[arg-type]  # the Trainer checks it
        accumulate_grad_batches=study.accumulate_grad_batches,
        max_steps=study.num_steps,
        # The progress bar then knows where the run ends, also where the data have no end.
        limit_train_batches=num_batches if is_watched else None,
        val_check_interval=validate_every * study.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=study.gradient_clip_val,
        log_every_n_steps=min(10, log_every) if is_watched else log_every,
        logger=TensorBoardLogger(folder, "", version="", default_hp_metric=False),
        callbacks=callbacks,
        enable_checkpointing=is_watched,
        enable_progress_bar=is_watched,
        enable_model_summary=False,
    )


def _make_checkpoint(folder: Path, every_num_steps: int) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder / "checkpoints",
        filename="{step}",
        every_n_train_steps=every_num_steps,
        save_on_exception=True,
    )
