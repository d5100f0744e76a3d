"""Generalized primal averaging as a lookahead rule."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ema_nesterov.core.rule import Fold, Method, wide_dtype
from lightning_ema_nesterov.core.sharding import local

__all__ = ["GPADirections"]


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
