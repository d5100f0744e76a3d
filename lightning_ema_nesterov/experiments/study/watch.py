"""Callbacks of every run of a study: what is noted, what is kept, and where Ctrl-C stops it."""

from __future__ import annotations

import math
import signal
import statistics
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_ema_nesterov.experiments.study.results import (
    DIVERGED,
    PEAK_MEMORY,
    STATE_BYTES,
    STATE_PER_PARAMETER,
    STEP_SECONDS,
    TOKENS_PER_SECOND,
)

__all__ = ["KeepsLast", "StopsAtBatchEnd", "Watch"]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


class Watch(Callback):
    """Times the steps, and ends a run whose loss is not finite.

    The time of a step is that of all batches that it accumulates, without loading them.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: list[float] = []
        self.is_diverged = False
        self.val_loss: float | None = None
        self.state_elements = 0
        self.state_bytes = 0
        self.peak_memory = 0
        self._started = 0.0
        self._seconds_of_step = 0.0
        self._num_steps = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._num_steps = trainer.global_step
        if pl_module.device.type == "cuda":  # of the run before in this process it says nothing
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._started = self.clock()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # It waits for a GPU: for the optimizer's step too. A step without a loss was skipped.
        loss = float(outputs["loss"]) if outputs else 0.0
        self._seconds_of_step += self.clock() - self._started
        if trainer.global_step > self._num_steps or not math.isfinite(loss):
            self.seconds.append(self._seconds_of_step)
            self._num_steps, self._seconds_of_step = trainer.global_step, 0.0
        if not math.isfinite(loss):
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
        self._note_memory(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note_memory(pl_module)

    def _note_memory(self, pl_module: LightningModule) -> None:
        if pl_module.device.type == "cuda":
            most = torch.cuda.max_memory_allocated(pl_module.device)
            self.peak_memory = max(self.peak_memory, most)

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
            "peak_memory": self.peak_memory,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]
        self.val_loss = state_dict["val_loss"]
        self.state_elements = state_dict["state_elements"]
        self.state_bytes = state_dict["state_bytes"]
        self.peak_memory = state_dict["peak_memory"]

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
        step_seconds = statistics.median(self.seconds)
        # A user's own data need not know what a token is.
        tokens = getattr(trainer.datamodule, "tokens_per_batch", None)  # type: ignore[attr-defined]
        known = {}
        if tokens is not None and step_seconds > 0:  # a coarse clock
            known[TOKENS_PER_SECOND] = tokens * trainer.accumulate_grad_batches / step_seconds
        if self.peak_memory:
            known[PEAK_MEMORY] = float(self.peak_memory)
        [logger] = trainer.loggers
        logger.log_hyperparams(hyperparameters, {"hp/val_loss": val_loss})
        logger.log_metrics(
            {
                STEP_SECONDS: step_seconds,
                **known,
                STATE_PER_PARAMETER: self.state_elements / elements,
                STATE_BYTES: float(self.state_bytes),
                DIVERGED: float(self.is_diverged or not math.isfinite(val_loss)),
            },
            step=max(0, trainer.global_step - 1),
        )
        logger.finalize("success")


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


class StopsAtBatchEnd(Callback):
    """Lets Ctrl-C end a run when its batch has ended. A second one ends it at once.

    At any other moment it can meet the Trainer halfway through a change, such as setting up its
    loaders, and on the way out the Trainer then raises another error.
    """

    def __init__(self) -> None:
        self._is_asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note Ctrl-C inside the block, where nobody else decided about it.

        Raises:
            KeyboardInterrupt: At the end of a batch, or of the block if no batch came.
        """
        is_decided = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        if is_decided or threading.current_thread() is not threading.main_thread():
            yield
            return
        signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._stop()

    def _note(self, *_: object) -> None:
        self._is_asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _stop(self) -> None:
        if self._is_asked:
            raise KeyboardInterrupt

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._stop()

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._stop()
