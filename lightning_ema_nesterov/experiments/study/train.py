"""One run of a study, as an ordinary run of the Trainer."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from lightning_ema_nesterov.experiments.advice import without_advice
from lightning_ema_nesterov.experiments.study.results import (
    DIVERGED,
    STATE_PER_PARAMETER,
    STEP_SECONDS,
)
from lightning_ema_nesterov.experiments.study.spec import BaseOptimizer, Run, Study, find_class
from lightning_ema_nesterov.optimizers.from_config import build_optimizer
from lightning_ema_nesterov.optimizers.lr_schedule import WarmupStableDecay

__all__ = ["train_run"]


def train_run(study: Study, run: Run, root: Path) -> None:
    """Train one run of a study and write its event file.

    A run whose loss is not finite ends there, and says so in the event file.

    Args:
        study: The study.
        run: One of its runs.
        root: Folder below which the run's folder is made; what is there of it is replaced.
    """
    torch.set_num_threads(study.num_threads)
    shutil.rmtree(root / run.folder, ignore_errors=True)
    seed_everything(run.seed, verbose=False)
    model = _build(study.model)
    _set_optimizer(model, study, run)
    # Other processes on the machine do not count for a run on its CPU.
    watch = _Watch(time.process_time if study.accelerator == "cpu" else time.perf_counter)
    method = study.methods[run.method]
    callbacks: list[Callback] = [watch, *map(_build, study.callbacks)]
    if method.class_path is not None:
        callbacks.append(find_class(method.class_path)(**method.init_args))
    with without_advice():
        trainer = _make_trainer(study, root / run.folder, callbacks)
        trainer.fit(model, datamodule=_build(study.data))
    watch.write(trainer)


def _build(spec: dict[str, Any]) -> Any:
    return find_class(spec["class_path"])(**(spec.get("init_args") or {}))


def _set_optimizer(model: LightningModule, study: Study, run: Run) -> None:
    spec = study.optimizer_of(run)
    decay = study.lr_decay if spec.lr_decay is None else spec.lr_decay
    schedule = WarmupStableDecay.of_fractions(study.num_steps, warmup=study.lr_warmup, decay=decay)

    def configure_optimizers() -> Any:
        optimizer = _make_optimizer(spec, run.lr, model)
        scheduler = LambdaLR(optimizer, lambda step_idx: schedule.lr_at(step_idx))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    model.configure_optimizers = configure_optimizers  # type: ignore[method-assign]  # of this one


def _make_optimizer(spec: BaseOptimizer, lr: float, model: nn.Module) -> Optimizer:
    named = {"class_path": spec.class_path, "init_args": spec.init_args}
    optimizer = build_optimizer(named, model.parameters(), argument="base_optimizers")
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr"] / optimizer.defaults["lr"]
    return optimizer


def _make_trainer(study: Study, folder: Path, callbacks: list[Callback]) -> Trainer:
    return Trainer(
        accelerator=study.accelerator,
        devices=1,
        max_steps=study.num_steps,
        val_check_interval=study.num_steps // study.num_validations,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=study.gradient_clip_val,
        log_every_n_steps=max(1, study.num_steps // 50),
        logger=TensorBoardLogger(folder, "", version="", default_hp_metric=False),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


class _Watch(Callback):
    """Times the steps, and ends a run whose loss is not finite.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: list[float] = []
        self.is_diverged = False
        self.state_elements = 0
        self._started = 0.0

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._started = self.clock()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds.append(self.clock() - self._started)
        if not math.isfinite(float(outputs["loss"])):
            self.is_diverged = True
            trainer.should_stop = True

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        [optimizer] = trainer.optimizers
        kept = [t for entry in optimizer.state.values() for t in _tensors(entry)]
        self.state_elements = max(self.state_elements, sum(t.numel() for t in kept if t.ndim))

    def write(self, trainer: Trainer) -> None:
        """Add what is known after the run to its event file."""
        val_loss = float(trainer.callback_metrics.get("val_loss", math.nan))
        elements = sum(p.numel() for p in trainer.lightning_module.parameters())
        [logger] = trainer.loggers
        logger.log_metrics(
            {
                STEP_SECONDS: statistics.median(self.seconds),
                STATE_PER_PARAMETER: self.state_elements / elements,
                DIVERGED: float(self.is_diverged or not math.isfinite(val_loss)),
            },
            step=max(0, trainer.global_step - 1),
        )
        logger.finalize("success")
