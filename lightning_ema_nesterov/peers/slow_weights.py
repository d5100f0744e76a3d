"""Slow weights that follow the base optimizer every few steps: Lookahead and SNOO."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

import lightning_ema_nesterov.lookahead as core
from lightning_ema_nesterov.method import Fold, Method, wide_dtype
from lightning_ema_nesterov.placement import LookaheadCallback
from lightning_ema_nesterov.schedule import LookaheadSchedule, check_unit_interval
from lightning_ema_nesterov.sharding import local

__all__ = ["SNOO", "Lookahead", "SlowWeights"]


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
    def make_lookaheads(self, trainer: Trainer) -> list[core.Lookahead]:
        # Gradients are taken at the fast weights: there is nothing to extrapolate.
        return [
            core.Lookahead(
                optimizer,
                LookaheadSchedule(0.0),
                SlowWeights(optimizer, self.num_inner_steps, self.outer_lr, self.outer_momentum),
                module=trainer.strategy.model,
            )
            for optimizer in trainer.optimizers
        ]


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


class SlowWeights(Method):
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
        super().__init__(base_optimizer)
        self.num_inner_steps = num_inner_steps
        self.outer_lr = outer_lr
        self.outer_momentum = outer_momentum
        self.keys = ("slow_weights", "slow_momentum") if outer_momentum else ("slow_weights",)

    @override
    def begin(self, params: list[Tensor], step_size: float, *, is_measured: bool) -> Fold:
        # Where slow weights start: before the parameter's first step.
        slow = [self.of([p])[0] if self.has(p) else _wide_copy(p) for p in params]
        return Fold(params, slow, step_size)

    @override
    def finish(self, folds: list[Fold], *, step_idx: int) -> None:
        for fold in folds:
            self._keep(fold.params, fold.buffers)
        if (step_idx + 1) % self.num_inner_steps == 0:
            self._take_outer_step()
        self.complete()

    @override
    def settle(self, fold: Fold) -> list[Tensor]:
        self._keep(*fold.part(is_changed=True))
        return fold.part(is_changed=False)[0]

    def _keep(self, params: list[Tensor], slow: list[Tensor]) -> None:
        for p, buffer in zip(params, slow, strict=True):
            if not self.has(p):
                self.base_optimizer.state[p].update(self.make_state(p))
                self.base_optimizer.state[p]["slow_weights"] = buffer

    @torch.no_grad()
    def _take_outer_step(self) -> None:
        for p in self.known_params():
            fast, *state = local([p, *(self.of([p], key)[0] for key in self.keys)])
            gradient = state[0] - fast  # as an optimizer of the slow weights sees it
            if self.outer_momentum:
                state[1].mul_(self.outer_momentum).add_(gradient)
                gradient.add_(state[1], alpha=self.outer_momentum)
            fast.copy_(state[0].sub_(gradient, alpha=self.outer_lr))

    @override
    def make_state(self, p: Tensor) -> dict[str, Tensor]:
        slow = _wide_copy(p)
        return {key: slow if key == "slow_weights" else torch.zeros_like(slow) for key in self.keys}


def _wide_copy(p: Tensor) -> Tensor:
    return p.detach().to(wide_dtype(p), copy=True)


def _check_num_inner_steps(value: int) -> None:
    if value < 1:
        raise ValueError(f"num_inner_steps must be at least 1, got {value}.")


def _check_above_zero(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}.")
