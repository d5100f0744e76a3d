"""One-step Nesterov in the Trainer."""

from __future__ import annotations

from lightning.pytorch import Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ema_nesterov.core.checks import check_unit_interval
from lightning_ema_nesterov.core.rule import LookaheadRule
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.rules.last_displacement import LastDisplacement
from lightning_ema_nesterov.trainer.base_callback import LookaheadCallback

__all__ = ["Nesterov"]


class Nesterov(LookaheadCallback):
    r"""Take gradients at :math:`y_t = x_t + \beta (x_t - x_{t-1})`, with any base optimizer.

    Args:
        lookahead_step_size: Step size :math:`\beta`, in [0, 1).

    Raises:
        ValueError: If it is out of its range.
    """

    def __init__(self, lookahead_step_size: float = 0.3) -> None:
        super().__init__()
        check_unit_interval("lookahead_step_size", lookahead_step_size)
        self.lookahead_step_size = lookahead_step_size

    @override
    def make_rule(self, trainer: Trainer, optimizer: Optimizer) -> LookaheadRule:
        return LastDisplacement(optimizer)

    @override
    def make_schedule(self, trainer: Trainer) -> LookaheadSchedule:
        return LookaheadSchedule(self.lookahead_step_size, scale_with_lr=False)
