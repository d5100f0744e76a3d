"""The loss of training on the batches of a validation, wherever the parameters are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_ema_nesterov.callback import EMANesterov
from lightning_ema_nesterov.trainer.questions import callbacks_of

__all__ = ["ValidationLoss"]


class ValidationLoss(Callback, ABC):
    """Keeps the batches of a validation and takes the loss of ``training_step`` on them.

    Args:
        num_batches: Batches to keep, at least 1; ``None``: all.

    Raises:
        ValueError: If ``num_batches`` is below 1.
        MisconfigurationException: When fit starts, without an EMANesterov callback.
    """

    def __init__(self, num_batches: int | None) -> None:
        if num_batches is not None and num_batches < 1:
            raise ValueError(f"num_batches must be at least 1, got {num_batches}.")
        self.num_batches = num_batches
        self._batches: list[Any] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is a direction."""
        self.ema_nesterov_of(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the batches of the last validation."""
        self._batches = []

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch."""
        if self.num_batches is None or len(self._batches) < self.num_batches:
            self._batches.append(batch)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log, and let go of the batches."""
        if not trainer.sanity_checking and trainer.loggers:
            self.measure(trainer)
        self._batches = []

    @abstractmethod
    def measure(self, trainer: Trainer) -> None:
        """Measure losses of the batches of a validation, and log them."""

    def ema_nesterov_of(self, trainer: Trainer) -> EMANesterov:
        """Return the callback whose direction it is.

        Raises:
            MisconfigurationException: If there is none.
        """
        for callback in callbacks_of(trainer):
            if isinstance(callback, EMANesterov):
                return callback
        raise MisconfigurationException(
            f"{type(self).__name__} needs the direction of an EMANesterov callback, and there is "
            "none."
        )

    def mean_loss(self, trainer: Trainer) -> float:
        """Return the mean loss over the batches and processes, with the parameters as they are."""
        losses = [_loss_of(trainer, batch, idx) for idx, batch in enumerate(self._batches)]
        return float(trainer.strategy.reduce(torch.stack(losses).mean(), reduce_op="mean"))


def _loss_of(trainer: Trainer, batch: Any, batch_idx: int) -> Tensor:
    module = trainer.lightning_module
    with _silenced(module), torch.no_grad(), trainer.precision_plugin.train_step_context():
        outputs = module.training_step(batch, batch_idx)
    loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"training_step must return a loss for a loss to be measured, and returned {loss!r}."
        )
    return loss.detach().float()


@contextmanager
def _silenced(module: LightningModule) -> Iterator[None]:
    """Drop what a module logs, and evaluate it."""
    was_training = module.training
    module.eval()
    for name in ("log", "log_dict"):
        object.__setattr__(module, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            object.__delattr__(module, name)
        module.train(was_training)
