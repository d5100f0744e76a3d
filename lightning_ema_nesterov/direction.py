"""The EMA direction of one base optimizer: where it is kept, and how a step updates it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ema_nesterov.functional import begin_update_, cancel_update_, finish_update_
from lightning_ema_nesterov.metrics import StepMetrics, sums_of_step
from lightning_ema_nesterov.sharding import Sharding, local

__all__ = ["DIRECTION_KEY", "EMADirections", "Fold"]

DIRECTION_KEY = "ema_nesterov_direction"
"""Key of the EMA direction in the base optimizer's state of a parameter."""


@dataclass(frozen=True)
class Fold:
    """Parameters that the base optimizer is stepping together, with one step size.

    Attributes:
        params: The parameters.
        buffers: What :func:`~lightning_ema_nesterov.functional.begin_update_` left, one for each.
        step_size: Their current step size.
        versions: Autograd's counts of in-place changes, from before the base optimizer's step.
        previous: Copies of the directions from before, where they are to be measured; ``None``
            stands for zero.
    """

    params: list[Tensor]
    buffers: list[Tensor]
    step_size: float
    versions: list[int]
    previous: list[Tensor | None]


class EMADirections:
    r"""EMA directions in ``base_optimizer.state[p]["ema_nesterov_direction"]``.

    One tensor per parameter, of its shape and placed like it, so that every strategy saves, gathers
    and reshards it; in float32 or the parameter's dtype where that is wider.
    It is made in the first step in which the parameter has a gradient, after the base optimizer:
    most base optimizers take a parameter with any state for one that they have initialised.

    Args:
        base_optimizer: The optimizer whose state holds the directions.
        ema_decay: Weight :math:`\gamma` of the past, in [0, 1).
        sharding: Who shares the parameters.
    """

    def __init__(self, base_optimizer: Optimizer, ema_decay: float, sharding: Sharding) -> None:
        self.base_optimizer = base_optimizer
        self.ema_decay = ema_decay
        self.sharding = sharding
        self._loaded: list[Tensor | None] = []

    def has(self, p: Tensor) -> bool:
        """Return whether a parameter has a direction; without one, it is zero."""
        # `state` is a defaultdict: indexing it would give every parameter an empty state.
        return DIRECTION_KEY in self.base_optimizer.state.get(p, {})

    def of(self, params: list[Tensor]) -> list[Tensor]:
        """Return the directions of parameters that have one."""
        return [self.base_optimizer.state[p][DIRECTION_KEY] for p in params]

    def begin(self, params: list[Tensor], step_size: float, *, is_measured: bool) -> Fold:
        """Start the update, right before the base optimizer's step.

        Args:
            params: Parameters that will be stepped, at their lookahead points.
            step_size: The step size with which these were made.
            is_measured: Whether to keep copies of the directions for :meth:`measure`.
        """
        known = [p for p in params if self.has(p)]
        new = [p for p in params if not self.has(p)]
        buffers = self.of(known)
        previous = [m.clone() if is_measured else None for m in buffers]
        begin_update_(local(buffers), local(known), ema_decay=self.ema_decay, step_size=step_size)
        # m_0 = 0: the fold of a new direction needs the iterate alone.
        buffers += [p.detach().to(_dtype_of_direction(p)).mul(self.ema_decay - 1.0) for p in new]
        params = known + new
        previous += [None] * len(new)
        return Fold(params, buffers, step_size, [p._version for p in params], previous)

    def finish(self, folds: list[Fold]) -> None:
        """End the update, right after the base optimizer's step."""
        for fold in folds:
            self._finish(fold.params, fold.buffers)
        self._complete()

    def _complete(self) -> None:
        # A distributed checkpoint is read into what a step with all gradients leaves. Where the
        # base optimizer has no state, a parameter without a gradient needs ours.
        groups = self.base_optimizer.param_groups
        params = [p for group in groups for p in group["params"] if p.requires_grad]
        missing = [p for p in params if not self.has(p)]
        states = self.base_optimizer.state.values()
        if missing and all(set(state) == {DIRECTION_KEY} for state in states):
            for p in missing:
                zero = torch.zeros_like(p, dtype=_dtype_of_direction(p))
                self.base_optimizer.state[p][DIRECTION_KEY] = zero

    def settle(self, fold: Fold) -> list[Tensor]:
        """End an update whose step was interrupted.

        Parameters that the base optimizer changed count as stepped. Of the others the directions go
        back to what they were.

        Returns:
            The others; they are still at their lookahead points.
        """
        changed = [p._version != v for p, v in zip(fold.params, fold.versions, strict=True)]
        sides = []
        for side in (True, False):
            chosen = [idx for idx, is_changed in enumerate(changed) if is_changed is side]
            sides.append(([fold.params[i] for i in chosen], [fold.buffers[i] for i in chosen]))
        (stepped, finished), (waiting, cancelled) = sides
        self._finish(stepped, finished)
        cancel_update_(
            local(cancelled), local(waiting), ema_decay=self.ema_decay, step_size=fold.step_size
        )
        return waiting

    def _finish(self, params: list[Tensor], buffers: list[Tensor]) -> None:
        finish_update_(local(buffers), local(params), ema_decay=self.ema_decay)
        for p, buffer in zip(params, buffers, strict=True):
            self.base_optimizer.state[p][DIRECTION_KEY] = buffer

    def measure(self, folds: list[Fold]) -> StepMetrics:
        """Measure a finished step; the only communication, where parameters are sharded."""
        params = [p for fold in folds for p in fold.params]
        previous = [m for fold in folds for m in fold.previous]
        rows = sums_of_step(
            [None if m is None else local([m])[0] for m in previous],
            local(m for fold in folds for m in fold.buffers),
            ema_decay=self.ema_decay,
        )
        step_size = max((fold.step_size for fold in folds), default=0.0)
        return StepMetrics.from_sums(self.sharding.sum_over_shards(params, rows), step_size)

    def keep_dtype_on_load(self) -> list[RemovableHandle]:
        """Register hooks: ``load_state_dict`` rounds every state to its parameter's dtype."""
        return [
            self.base_optimizer.register_load_state_dict_pre_hook(self._before_load),
            self.base_optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        self._loaded = [state_dict["state"].get(key, {}).get(DIRECTION_KEY) for key in keys]

    def _after_load(self, optimizer: Optimizer) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for p, loaded in zip(params, self._loaded, strict=True):
            dtype = _dtype_of_direction(p)
            if loaded is not None and optimizer.state[p][DIRECTION_KEY].dtype != dtype:
                optimizer.state[p][DIRECTION_KEY] = loaded.to(p.device, dtype)
        self._loaded = []


def _dtype_of_direction(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
