"""Generalized primal averaging around any optimizer."""

from __future__ import annotations

from lightning.pytorch import Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ema_nesterov.core.rule import LookaheadRule
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.rules.gpa import GPADirections
from lightning_ema_nesterov.trainer.base_callback import LookaheadCallback

__all__ = ["GPA"]


class GPA(LookaheadCallback):
    r"""Generalized primal averaging (GPA), with any base optimizer :math:`A_t`.

    .. math::

        y_t     &= \mu_y\, x_t + (1 - \mu_y)\, z_t        && \text{before the forward pass} \\
        z_{t+1} &= z_t + A_t(y_t) - y_t                   && \text{the base optimizer's step} \\
        x_{t+1} &= \mu_x\, x_t + (1 - \mu_x)\, z_{t+1}    && x_0 = z_0

    Parameters hold the average :math:`x` whenever anyone but the training step can look. The
    optimizer's state holds :math:`z - x`, one tensor per parameter; a second one is there while
    the base optimizer steps. Weight decay is part of :math:`A_t`, so it acts at :math:`y`.

    With constant step size, ``EMANesterov(b, g)`` takes its gradients at the same points as GPA
    with ``mu_y = b``, ``mu_x = g + (1 - g) b`` and the base learning rate divided by ``1 - b``.

    Args:
        mu_y: Share :math:`\mu_y` of the average in the point of the gradient, in (0, 1].
        mu_x: Weight :math:`\mu_x` of the past in the average, in [0, 1). Averaging over about K
            steps, as DiLoCo with K inner steps does, takes ``0.9 ** (1 / K)``.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        Defazio et al., *Generalized Primal Averaging*, 2025: reference implementation in
        https://github.com/facebookresearch/optimizers
    """

    def __init__(self, mu_y: float = 0.7, mu_x: float = 0.9967) -> None:
        super().__init__()
        if not 0 < mu_y <= 1:
            raise ValueError(f"mu_y must be in (0, 1], got {mu_y}.")
        if not 0 <= mu_x < 1:
            raise ValueError(f"mu_x must be in [0, 1), got {mu_x}.")
        self.mu_y = mu_y
        self.mu_x = mu_x

    @override
    def make_rule(self, trainer: Trainer, optimizer: Optimizer) -> LookaheadRule:
        return GPADirections(optimizer, self.mu_x)

    @override
    def make_schedule(self, trainer: Trainer) -> LookaheadSchedule:
        return LookaheadSchedule(1.0 - self.mu_y, scale_with_lr=False)
