"""Generalized primal averaging around any optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ema_nesterov.lookahead import Lookahead
from lightning_ema_nesterov.method import Fold, Method, wide_dtype
from lightning_ema_nesterov.placement import LookaheadCallback
from lightning_ema_nesterov.schedule import LookaheadSchedule
from lightning_ema_nesterov.sharding import local

__all__ = ["GPA", "GPADirections"]


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
    def make_lookaheads(self, trainer: Trainer) -> list[Lookahead]:
        schedule = LookaheadSchedule(1.0 - self.mu_y, scale_with_lr=False)
        return [
            Lookahead(
                optimizer,
                schedule,
                GPADirections(optimizer, self.mu_x),
                module=trainer.strategy.model,
            )
            for optimizer in trainer.optimizers
        ]


@dataclass(frozen=True)
class _GPAFold(Fold):
    """A fold that also has the iterate of each parameter."""

    iterates: dict[Tensor, Tensor] = field(default_factory=dict)


class GPADirections(Method):
    r"""Directions :math:`d = z - x`, from the average to the base optimizer's own sequence.

    The step size is :math:`1 - \mu_y`: :math:`y = x + (1 - \mu_y)\, d`.

    Args:
        base_optimizer: The optimizer whose state holds the directions.
        mu_x: Weight of the past in the average, in [0, 1).
    """

    keys = ("gpa_direction",)

    def __init__(self, base_optimizer: Optimizer, mu_x: float) -> None:
        super().__init__(base_optimizer)
        self.mu_x = mu_x

    @override
    @torch.no_grad()
    def begin(self, params: list[Tensor], step_size: float, *, is_measured: bool) -> Fold:
        known = [p for p in params if self.has(p)]
        new = [p for p in params if not self.has(p)]
        directions = [*self.of(known), *(self.make_state(p)[self.keys[0]] for p in new)]
        iterates = [p.detach().to(wide_dtype(p), copy=True) for p in (*known, *new)]
        if known:
            torch._foreach_add_(
                local(iterates[: len(known)]), local(directions[: len(known)]), alpha=-step_size
            )
        params = [*known, *new]
        pairs = dict(zip(params, iterates, strict=True))
        return _GPAFold(params, directions, step_size, iterates=pairs)

    @override
    def finish(self, folds: list[Fold], *, step_idx: int) -> None:
        for fold in folds:
            self._finish(fold, fold.params, fold.buffers)
        self.complete()

    @override
    def settle(self, fold: Fold) -> list[Tensor]:
        self._finish(fold, *fold.part(is_changed=True))
        return fold.part(is_changed=False)[0]

    @torch.no_grad()
    def _finish(self, fold: Fold, params: list[Tensor], directions: list[Tensor]) -> None:
        # With e = d + A(y) - y, and y = x + s d:
        #   z' = x + e,  x' = mu_x x + (1 - mu_x) z' = x + (1 - mu_x) e,  d' = z' - x' = mu_x e.
        assert isinstance(fold, _GPAFold)  # noqa: S101  # for the type checker
        for p, direction in zip(params, directions, strict=True):
            p_here, d, x = local([p, direction, fold.iterates[p]])
            e = d.mul_(1.0 - fold.step_size).add_(p_here).sub_(x)
            p_here.copy_(x.add_(e, alpha=1.0 - self.mu_x))
            d.mul_(self.mu_x)
            self.base_optimizer.state[p][self.keys[0]] = direction

    @override
    def make_state(self, p: Tensor) -> dict[str, Tensor]:
        return {self.keys[0]: torch.zeros_like(p, dtype=wide_dtype(p))}
