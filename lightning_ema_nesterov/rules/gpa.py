"""Generalized primal averaging as a lookahead rule."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ema_nesterov.core.rule import Fold, LookaheadRule
from lightning_ema_nesterov.core.sharding import local
from lightning_ema_nesterov.core.state_store import wide_dtype

__all__ = ["GPADirections"]


class GPADirections(LookaheadRule):
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
    def make_state(self, p: Tensor) -> dict[str, Tensor]:
        return {self.keys[0]: torch.zeros_like(p, dtype=wide_dtype(p))}

    @override
    @torch.no_grad()
    def begin(self, params: list[Tensor], step_size: float, *, is_measured: bool) -> Fold:
        has = self.store.has
        iterates = [self.iterate_of(p, step_size if has(p) else 0.0) for p in params]
        return Fold(params, step_size, [x.to(wide_dtype(x)) for x in iterates])

    @override
    @torch.no_grad()
    def finish(self, fold: Fold, *, step_idx: int) -> None:
        # With e = d + A(y) - y, and y = x + s d:
        #   z' = x + e,  x' = mu_x x + (1 - mu_x) z' = x + (1 - mu_x) e,  d' = z' - x' = mu_x e.
        for p, iterate in zip(fold.params, fold.buffers, strict=True):
            if not self.store.has(p):
                self.store.put(p, self.make_state(p))
            p_here, x, d = local([p, iterate, *self.store.column([p])])
            e = d.mul_(1.0 - fold.step_size).add_(p_here).sub_(x)
            p_here.copy_(x.add_(e, alpha=1.0 - self.mu_x))
            d.mul_(self.mu_x)
