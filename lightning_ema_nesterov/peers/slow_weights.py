"""Slow weights that follow the base optimizer every few steps: Lookahead and SNOO."""

from __future__ import annotations

from lightning.pytorch import Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ema_nesterov.core.checks import check_unit_interval
from lightning_ema_nesterov.core.rule import LookaheadRule
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.rules.slow_weights import SlowWeights
from lightning_ema_nesterov.trainer.base_callback import LookaheadCallback

__all__ = ["SNOO", "Lookahead"]


class SNOO(LookaheadCallback):
    r"""Step-K Nesterov outer optimizer (SNOO); DiLoCo and MuLoCo with a single worker.

    After every K steps of the base optimizer, with slow weights :math:`\phi` and the fast ones
    :math:`\theta` that it trains:

    .. math::

        b &\leftarrow \mu\, b + (\phi - \theta) \\
        \phi &\leftarrow \phi - \eta\, (\phi - \theta + \mu\, b), \qquad \theta \leftarrow \phi

    Parameters always hold :math:`\theta`. The slow weights and :math:`b` are in the optimizer's
    state, two tensors per parameter. A step that GradScaler skipped counts as one of the K.

    Args:
        num_inner_steps: Steps K of the base optimizer between two outer ones, at least 1.
        outer_lr: Outer learning rate :math:`\eta`, above 0.
        outer_momentum: Outer momentum :math:`\mu`, in [0, 1).

    Raises:
        ValueError: If an argument is out of its range.

    References:
        Kallusky et al., *SNOO: Step-K Nesterov Outer Optimizer*, 2025; reference implementation in
        https://github.com/facebookresearch/optimizers
    """

    def __init__(
        self, num_inner_steps: int = 50, outer_lr: float = 0.8, outer_momentum: float = 0.5
    ) -> None:
        super().__init__()
        _check_num_inner_steps(num_inner_steps)
        _check_above_zero("outer_lr", outer_lr)
        check_unit_interval("outer_momentum", outer_momentum)
        self.num_inner_steps = num_inner_steps
        self.outer_lr = outer_lr
        self.outer_momentum = outer_momentum

    @override
    def make_rule(self, trainer: Trainer, optimizer: Optimizer) -> LookaheadRule:
        return SlowWeights(optimizer, self.num_inner_steps, self.outer_lr, self.outer_momentum)

    @override
    def make_schedule(self, trainer: Trainer) -> LookaheadSchedule:
        return LookaheadSchedule(0.0)  # gradients are taken at the fast weights


class Lookahead(SNOO):
    r"""Lookahead of Zhang et al.: slow weights follow the fast ones, which start from them again.

    After every K steps of the base optimizer
    :math:`\phi \leftarrow \phi + \alpha (\theta - \phi)` and :math:`\theta \leftarrow \phi`.
    It is :class:`SNOO` without momentum. Parameters always hold :math:`\theta`; the slow weights
    are in the optimizer's state, one tensor per parameter.

    Args:
        num_inner_steps: Steps K of the base optimizer between two outer ones, at least 1.
        alpha: Share :math:`\alpha` of the way that the slow weights go, above 0; above 1 they
            extrapolate.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        Zhang, Lucas, Hinton, Ba, *Lookahead Optimizer: k steps forward, 1 step back*, 2019.
        https://arxiv.org/abs/1907.08610
    """

    def __init__(self, num_inner_steps: int = 5, alpha: float = 0.5) -> None:
        _check_above_zero("alpha", alpha)
        super().__init__(num_inner_steps, outer_lr=alpha, outer_momentum=0.0)


def _check_num_inner_steps(value: int) -> None:
    if value < 1:
        raise ValueError(f"num_inner_steps must be at least 1, got {value}.")


def _check_above_zero(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}.")
