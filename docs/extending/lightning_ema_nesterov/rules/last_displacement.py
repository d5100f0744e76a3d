"""One-step Nesterov: look ahead along the last displacement."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ema_nesterov.core.metrics import StepMetrics, row_of_step
from lightning_ema_nesterov.core.rule import Fold, LookaheadRule, largest_step_size
from lightning_ema_nesterov.core.sharding import Sharding, local
from lightning_ema_nesterov.core.state_store import wide_dtype

__all__ = ["LastDisplacement"]


class LastDisplacement(LookaheadRule):
    r"""Directions :math:`d_t = x_t - x_{t-1}` in the base optimizer's state.

    A parameter without one has the direction zero.

    Args:
        base_optimizer: The optimizer whose state holds the directions.
    """

    keys = ("last_displacement",)

    @override
    def make_state(self, p: Tensor) -> dict[str, Tensor]:
        return {self.keys[0]: torch.zeros_like(p, dtype=wide_dtype(p))}

    @override
    @torch.no_grad()
    def begin(self, params: list[Tensor], step_size: float, *, is_measured: bool) -> Fold:
        iterates = [p.detach().to(wide_dtype(p), copy=True) for p in params]  # they hold y
        kept: list[Tensor | None] = [None] * len(params)
        for i, p in enumerate(params):
            if self.store.has(p):
                local([iterates[i]])[0].add_(self.read_direction(p), alpha=-step_size)  # x
                kept[i] = self.store.column([p])[0] if is_measured else None
        return Fold(params, step_size, iterates, kept)

    @override
    @torch.no_grad()
    def finish(self, fold: Fold, *, step_idx: int) -> None:
        for p, iterate in zip(fold.params, fold.buffers, strict=True):
            self.store.put(p, {self.keys[0]: p.detach() - iterate})

    @override
    def cancel(self, fold: Fold) -> None:
        return  # begin changed neither the parameters nor the directions

    @override
    def measure(self, folds: list[Fold], sharding: Sharding) -> StepMetrics:
        params = [p for fold in folds for p in fold.params]
        rows = []
        for p, before in zip(params, (m for fold in folds for m in fold.kept), strict=True):
            after = self.read_direction(p)
            previous = torch.zeros_like(after) if before is None else local([before])[0]
            rows.append(row_of_step(previous, after, moved=after))
        sums = sharding.sum_over_shards(params, torch.stack(rows))
        return StepMetrics.from_sums(sums, largest_step_size(folds))
