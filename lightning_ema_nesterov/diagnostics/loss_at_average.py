"""The loss at the average and at the iterate, after each validation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from lightning.pytorch import Trainer
from typing_extensions import override

from lightning_ema_nesterov.core.checks import check_share
from lightning_ema_nesterov.diagnostics.validation_loss import ValidationLoss
from lightning_ema_nesterov.trainer.log import log_to_all

__all__ = ["LossAtAverage"]


class LossAtAverage(ValidationLoss):
    r"""Log the loss at :math:`x - s\,\gamma/(1-\gamma)\,m` for some shares :math:`s`.

    With the shares 0 and 1 TensorBoard has both curves, that of the iterate and that of its
    exponential average, whichever of them the validation itself sees. The loss is that of
    ``training_step`` on the validation batches, in evaluation mode and without gradients; what
    ``training_step`` logs there is dropped. For the time of the measurement a copy of the
    parameters is kept.

    Logged as ``ema_nesterov/loss_at_average/share=...``, in the unit of the loss.

    Args:
        shares: Shares of the way from the iterate to the average, in [0, 1].
        num_batches: Validation batches to take the mean loss over, at least 1; ``None``: all.

    Raises:
        ValueError: If a share or ``num_batches`` is out of its range, or there are no shares.
        MisconfigurationException: When fit starts, without an EMANesterov callback.

    Example:
        >>> from lightning_ema_nesterov import EMANesterov
        >>> callbacks = [EMANesterov(), LossAtAverage(shares=(0.0, 1.0))]
    """

    def __init__(
        self, shares: Sequence[float] = (0.0, 1.0), num_batches: int | None = None
    ) -> None:
        super().__init__(num_batches)
        if not shares:
            raise ValueError("shares must not be empty.")
        for share in shares:
            check_share("shares", share)
        self.shares = tuple(shares)

    @override
    def measure(self, trainer: Trainer) -> None:
        """Measure and log."""
        lookaheads = self.ema_nesterov_of(trainer).lookaheads
        losses = {}
        for share in self.shares if lookaheads else ():
            with ExitStack() as points:
                for lookahead in lookaheads:
                    points.enter_context(lookahead.at_average(share))
                losses[f"ema_nesterov/loss_at_average/share={share:g}"] = self.mean_loss(trainer)
        log_to_all(trainer, losses)
