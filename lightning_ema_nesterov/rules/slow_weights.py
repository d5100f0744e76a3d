"""Slow weights that follow the base optimizer every few steps, as a lookahead rule."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ema_nesterov.core.rule import Fold, LookaheadRule
from lightning_ema_nesterov.core.sharding import local
from lightning_ema_nesterov.core.state_store import wide_dtype

__all__ = ["SlowWeights"]


class SlowWeights(LookaheadRule):
    """Slow weights in the base optimizer's state, and their momentum if there is one.

    Args:
        base_optimizer: The optimizer whose state holds them.
        num_inner_steps: Steps between two outer ones, at least 1.
        outer_lr: Outer learning rate, above 0.
        outer_momentum: Outer momentum, in [0, 1).
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        num_inner_steps: int,
        outer_lr: float,
        outer_momentum: float,
    ) -> None:
        self.keys = ("slow_weights", "slow_momentum") if outer_momentum else ("slow_weights",)
        super().__init__(base_optimizer)
        self.num_inner_steps = num_inner_steps
        self.outer_lr = outer_lr
        self.outer_momentum = outer_momentum

    @override
    def make_state(self, p: Tensor) -> dict[str, Tensor]:
        slow = _wide_copy(p)
        return {key: slow if key == "slow_weights" else torch.zeros_like(slow) for key in self.keys}

    @override
    def begin(self, params: list[Tensor], step_size: float, *, is_measured: bool) -> Fold:
        # Where slow weights start: before the parameter's first step.
        has = self.store.has
        slow = [self.store.column([p])[0] if has(p) else _wide_copy(p) for p in params]
        return Fold(params, step_size, slow)

    @override
    def finish(self, fold: Fold, *, step_idx: int) -> None:
        for p, slow in zip(fold.params, fold.buffers, strict=True):
            if not self.store.has(p):
                self.store.put(p, {**self.make_state(p), "slow_weights": slow})

    @override
    def after_step(self, step_idx: int) -> None:
        if (step_idx + 1) % self.num_inner_steps == 0:
            self._take_outer_step()

    @torch.no_grad()
    def _take_outer_step(self) -> None:
        for p in self.store.known_params():
            if not p.requires_grad:
                continue  # frozen since
            fast, *state = local([p, *self.store.tensors([p])])
            gradient = state[0] - fast  # as an optimizer of the slow weights sees it
            if self.outer_momentum:
                state[1].mul_(self.outer_momentum).add_(gradient)
                gradient.add_(state[1], alpha=self.outer_momentum)
            fast.copy_(state[0].sub_(gradient, alpha=self.outer_lr))


def _wide_copy(p: Tensor) -> Tensor:
    return p.detach().to(wide_dtype(p), copy=True)
