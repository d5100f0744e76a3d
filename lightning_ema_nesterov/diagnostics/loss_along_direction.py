"""The loss along the EMA direction, after each validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_ema_nesterov.callback import EMANesterov
from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.sharding import local
from lightning_ema_nesterov.trainer.log import log_to_all
from lightning_ema_nesterov.trainer.questions import callbacks_of

__all__ = ["LossAlongDirection"]


class LossAlongDirection(Callback):
    r"""Log the loss at :math:`x + a\, m` for a few :math:`a`, after each validation.

    The loss is that of ``training_step`` on the first validation batches, in evaluation mode and
    without gradients; what ``training_step`` logs there is dropped. Along a one-step direction
    (``ema_decay=0``) it climbs steeply. Along an EMA direction it falls where the direction holds
    progress, as early in a run, and climbs a little where it holds noise. For the time of the
    measurement a copy of the parameters is kept.

    Logged as ``ema_nesterov/loss_along/a=...``: the loss there minus that at :math:`x`, in the unit
    of the loss. :math:`a` counts steps: :math:`m` is a parameter change per step.

    Args:
        distances: Values of :math:`a`.
        num_batches: Validation batches to take the mean loss over, at least 1.

    Raises:
        ValueError: If ``num_batches`` is below 1 or there are no ``distances``.
        MisconfigurationException: When fit starts, without an EMANesterov callback.
    """

    def __init__(
        self, distances: Sequence[float] = (0.5, 2.0, 10.0, 50.0), num_batches: int = 1
    ) -> None:
        if num_batches < 1 or not distances:
            raise ValueError(
                f"distances must not be empty and num_batches at least 1, got {distances!r} and "
                f"{num_batches}."
            )
        self.distances = tuple(distances)
        self.num_batches = num_batches
        self._batches: list[Any] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is a direction."""
        _ema_nesterov_of(trainer)

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
        """Keep the first batches."""
        if len(self._batches) < self.num_batches:
            self._batches.append(batch)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log."""
        if trainer.sanity_checking or not trainer.loggers:
            return
        pairs = [
            (lookahead, p)
            for lookahead in _ema_nesterov_of(trainer).lookaheads
            for p in lookahead.rule.store.known_params()
        ]
        if not pairs:
            return
        kept = [p.detach().clone() for _, p in pairs]
        try:
            with _silenced(pl_module), torch.no_grad():
                losses = [self._loss_at(a, trainer, pairs, kept) for a in (0.0, *self.distances)]
        finally:
            _set(pairs, kept)  # bit for bit: training goes on as if nobody had looked
        gaps = {
            f"ema_nesterov/loss_along/a={a:g}": loss - losses[0]
            for a, loss in zip(self.distances, losses[1:], strict=True)
        }
        log_to_all(trainer, gaps)

    def _loss_at(
        self,
        a: float,
        trainer: Trainer,
        pairs: Sequence[tuple[Lookahead, Tensor]],
        kept: Sequence[Tensor],
    ) -> float:
        _set(pairs, kept)
        for lookahead, p in pairs:
            [point] = local([p.data])
            point.add_(lookahead.rule.read_direction(p), alpha=a)
        losses = [_loss_of(trainer, batch, idx) for idx, batch in enumerate(self._batches)]
        mean = trainer.strategy.reduce(torch.stack(losses).mean(), reduce_op="mean")
        return float(mean)


def _set(pairs: Sequence[tuple[Lookahead, Tensor]], values: Sequence[Tensor]) -> None:
    for lookahead in dict.fromkeys(lookahead for lookahead, _ in pairs):
        lookahead.sharding.reshard()
    for (_, p), value in zip(pairs, values, strict=True):
        p.data.copy_(value)


def _loss_of(trainer: Trainer, batch: Any, batch_idx: int) -> Tensor:
    module = trainer.lightning_module
    with trainer.precision_plugin.train_step_context():
        outputs = module.training_step(batch, batch_idx)
    loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"LossAlongDirection needs a training_step that returns a loss, got {type(loss)}."
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


def _ema_nesterov_of(trainer: Trainer) -> EMANesterov:
    for callback in callbacks_of(trainer):
        if isinstance(callback, EMANesterov):
            return callback
    raise MisconfigurationException(
        "LossAlongDirection needs the direction of an EMANesterov callback, and there is none."
    )
