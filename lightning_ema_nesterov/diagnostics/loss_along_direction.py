"""The loss along the EMA direction, after each validation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import override

from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.sharding import local
from lightning_ema_nesterov.diagnostics.validation_loss import ValidationLoss
from lightning_ema_nesterov.trainer.log import log_to_all

__all__ = ["LossAlongDirection"]


class LossAlongDirection(ValidationLoss):
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
        super().__init__(num_batches)
        if not distances:
            raise ValueError("distances must not be empty.")
        self.distances = tuple(distances)

    @override
    def measure(self, trainer: Trainer) -> None:
        """Measure and log."""
        pairs = [
            (lookahead, p)
            for lookahead in self.ema_nesterov_of(trainer).lookaheads
            for p in lookahead.rule.store.known_params()
        ]
        if not pairs:
            return
        kept = [p.detach().clone() for _, p in pairs]
        try:
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
        with torch.no_grad():
            for lookahead, p in pairs:
                [point] = local([p.data])
                point.add_(lookahead.rule.read_direction(p), alpha=a)
        return self.mean_loss(trainer)


def _set(pairs: Sequence[tuple[Lookahead, Tensor]], values: Sequence[Tensor]) -> None:
    for lookahead in dict.fromkeys(lookahead for lookahead, _ in pairs):
        lookahead.sharding.drop_copies()
    for (_, p), value in zip(pairs, values, strict=True):
        p.data.copy_(value)
