"""Callbacks of every run of a study: what is noted, and what is kept to go on from."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_ema_nesterov.experiments.study.results import (
    DIVERGED,
    STATE_BYTES,
    STATE_PER_PARAMETER,
    STEP_SECONDS,
)

__all__ = ["PEAK_MEMORY", "KeepsLast", "Watch"]

PEAK_MEMORY = "study/peak_memory"
"""Tag of the most memory of a GPU that tensors had at once. Unit: bytes."""


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


class Watch(Callback):
    """Times the steps, and ends a run whose loss is not finite.

    Args:
        clock: Returns seconds.
        num_batches: Batches of a step.
    """

    def __init__(self, clock: Callable[[], float], num_batches: int = 1) -> None:
        self.clock = clock
        self.num_batches = num_batches
        self.seconds: list[float] = []
        self.is_diverged = False
        self.val_loss: float | None = None
        self.state_elements = 0
        self.state_bytes = 0
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
            # The method would advise another warmup; until the run's end nobody wants to hear that.
            warnings.filterwarnings("ignore", ".*did not look ahead.*")

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        [optimizer] = trainer.optimizers
        kept = [t for entry in optimizer.state.values() for t in _tensors(entry) if t.ndim]
        self.state_elements = max(self.state_elements, sum(t.numel() for t in kept))
        self.state_bytes = max(self.state_bytes, sum(t.nbytes for t in kept))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "val_loss" in trainer.callback_metrics:
            self.val_loss = float(trainer.callback_metrics["val_loss"])

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what was seen, for a run that goes on from a checkpoint."""
        return {
            "seconds": self.seconds,
            "val_loss": self.val_loss,
            "state_elements": self.state_elements,
            "state_bytes": self.state_bytes,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]
        self.val_loss = state_dict["val_loss"]
        self.state_elements = state_dict["state_elements"]
        self.state_bytes = state_dict["state_bytes"]

    def write(self, trainer: Trainer, hyperparameters: dict[str, Any]) -> None:
        """Add what is known after the run to its event file.

        Args:
            trainer: That of the run.
            hyperparameters: What TensorBoard shows in its table of runs.

        Raises:
            ValueError: If the model logged no ``val_loss``.
        """
        if self.val_loss is None and not self.is_diverged:
            name = type(trainer.lightning_module).__name__
            raise ValueError(f"model must log val_loss in validation, and {name} did not.")
        val_loss = math.nan if self.val_loss is None else self.val_loss
        elements = sum(p.numel() for p in trainer.lightning_module.parameters())
        [logger] = trainer.loggers
        logger.log_hyperparams(hyperparameters, {"hp/val_loss": val_loss})
        logger.log_metrics(
            {
                STEP_SECONDS: self.num_batches * statistics.median(self.seconds),
                **_peak_memory(trainer),
                STATE_PER_PARAMETER: self.state_elements / elements,
                STATE_BYTES: float(self.state_bytes),
                DIVERGED: float(self.is_diverged or not math.isfinite(val_loss)),
            },
            step=max(0, trainer.global_step - 1),
        )
        logger.finalize("success")


def _peak_memory(trainer: Trainer) -> dict[str, float]:
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return {}
    return {PEAK_MEMORY: float(torch.cuda.max_memory_allocated(device))}


class KeepsLast(Callback):
    """Keeps a checkpoint of the last validation, behind what was logged of it.

    Args:
        path: Its file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was logged, which a killed process would lose, then the checkpoint."""
        for logger in trainer.loggers:
            logger.experiment.flush()  # type: ignore[attr-defined]  # that of TensorBoard
        unfinished = self.path.with_suffix(".tmp")
        trainer.save_checkpoint(unfinished)
        unfinished.replace(self.path)
