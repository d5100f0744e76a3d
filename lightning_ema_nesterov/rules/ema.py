"""The EMA direction of one base optimizer: where it is kept, and how a step updates it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ema_nesterov.core.equations import (
    begin_update_,
    cancel_update_,
    finish_update_,
    fold_decay,
)
from lightning_ema_nesterov.core.metrics import StepMetrics, sums_of_step
from lightning_ema_nesterov.core.narrow import is_narrow, retract_exactly_
from lightning_ema_nesterov.core.rule import Fold, LookaheadRule, largest_step_size
from lightning_ema_nesterov.core.sharding import Sharding, local
from lightning_ema_nesterov.core.state_store import wide_dtype
from lightning_ema_nesterov.rules.codecs import read_any

__all__ = ["DIRECTION_KEY", "SCALES_KEY", "STEP_SIZE_KEY", "EMADirections"]

DIRECTION_KEY = "ema_nesterov_direction"
"""Key of the EMA direction in the base optimizer's state of a parameter."""

SCALES_KEY = "ema_nesterov_direction_scales"
"""Key of what turns the codes of an EMA direction in int8 into numbers."""

STEP_SIZE_KEY = "lookahead_step_size"
"""Key of a parameter group for a peak step size of its own, in (-1, 1)."""

_LEAST_DECAY = 0.1
"""Weight of the direction in its fold below which a copy of it is kept in the step."""


class EMADirections(LookaheadRule):
    r"""EMA directions in ``base_optimizer.state[p]["ema_nesterov_direction"]``.

    A parameter without one has the direction zero.

    Args:
        base_optimizer: The optimizer whose state holds the directions.
        ema_decay: Weight :math:`\gamma` of the past, in [0, 1).
    """

    keys = (DIRECTION_KEY,)
    loadable_keys = (DIRECTION_KEY, SCALES_KEY)
    step_size_key = STEP_SIZE_KEY

    def __init__(self, base_optimizer: Optimizer, ema_decay: float) -> None:
        super().__init__(base_optimizer)
        self.ema_decay = ema_decay

    @property
    @override
    def average_decay(self) -> float:
        # With d = x - a, both sides of a = x - gamma / (1 - gamma) m obey d' = gamma (d + x' - x).
        return self.ema_decay

    @override
    def make_state(self, p: Tensor) -> dict[str, Tensor]:
        return {DIRECTION_KEY: torch.zeros_like(p, dtype=wide_dtype(p))}

    @override
    def begin(self, params: list[Tensor], step_size: float, *, is_measured: bool) -> Fold:
        known = [p for p in params if self.store.has(p)]
        new = [p for p in params if not self.store.has(p)]
        buffers = self.store.column(known)
        kept: list[Tensor | None] = [
            m.clone() if is_measured or self._gives_nothing_back(p, step_size) else None
            for p, m in zip(known, buffers, strict=True)
        ]
        self._fold(known, buffers, step_size)
        # m_0 = 0: the fold of a new direction needs the iterate alone.
        buffers += [p.detach().to(wide_dtype(p)).mul(self.ema_decay - 1.0) for p in new]
        return Fold(known + new, step_size, buffers, [*kept, *[None] * len(new)])

    def _gives_nothing_back(self, p: Tensor, step_size: float) -> bool:
        """Return whether a fold has next to nothing of the direction in it."""
        decay = fold_decay(self.ema_decay, step_size)
        return min(abs(decay), self.ema_decay if is_narrow(p) else 1.0) < _LEAST_DECAY

    def _fold(self, params: list[Tensor], directions: list[Tensor], step_size: float) -> None:
        pairs = list(zip(params, directions, strict=True))
        for p, m in pairs:
            if is_narrow(p):  # y was rounded, and beta m is not its distance from x
                x = self.iterate_of(p, step_size)
                begin_update_(local([m]), local([x]), ema_decay=self.ema_decay, step_size=0.0)
        begin_update_(
            local(m for p, m in pairs if not is_narrow(p)),
            local(p for p, _ in pairs if not is_narrow(p)),
            ema_decay=self.ema_decay,
            step_size=step_size,
        )

    @override
    def finish(self, fold: Fold, *, step_idx: int) -> None:
        self._finish(fold.params, fold.buffers)

    @override
    def cancel(self, fold: Fold) -> None:
        rows = list(zip(fold.params, fold.buffers, fold.kept, strict=True))
        for _, buffer, kept in rows:
            if kept is not None:
                buffer.copy_(kept)
        folded = [(p, buffer) for p, buffer, kept in rows if kept is None]
        for p, b in folded:
            if is_narrow(p):
                x = self._iterate_in_fold(p, b, fold.step_size)
                cancel_update_(local([b]), local([x]), ema_decay=self.ema_decay, step_size=0.0)
        cancel_update_(
            local(b for p, b in folded if not is_narrow(p)),
            local(p for p, _ in folded if not is_narrow(p)),
            ema_decay=self.ema_decay,
            step_size=fold.step_size,
        )

    @torch.no_grad()
    def _iterate_in_fold(self, p: Tensor, fold: Tensor, step_size: float) -> Tensor:
        """Return the iterate of a narrow parameter that is at its lookahead point."""
        # From b = gamma m - (1 - gamma) x and y = x + beta m: the direction in which to go back,
        # as m itself would, is (b + (1 - gamma) y) / (gamma + (1 - gamma) beta).
        m = fold.clone()
        cancel_update_(local([m]), local([p]), ema_decay=self.ema_decay, step_size=step_size)
        x = p.detach().clone()
        [stays] = self._stays.get(p, [None])
        [point, direction] = local([x, m])
        retract_exactly_(point, direction, stays, step_size=step_size)
        return x

    def _finish(self, params: list[Tensor], buffers: list[Tensor]) -> None:
        finish_update_(local(buffers), local(params), ema_decay=self.ema_decay)
        for p, buffer in zip(params, buffers, strict=True):
            self.store.put(p, {DIRECTION_KEY: buffer})

    @override
    def restore(self, p: Tensor, loaded: dict[str, Tensor]) -> dict[str, Tensor]:
        stored = [loaded[key] for key in self.loadable_keys if key in loaded]
        return {DIRECTION_KEY: read_any(p, stored).to(p.device, wide_dtype(p))}

    @override
    def check_checkpoint(self, has: Callable[[str], bool]) -> None:
        if has(SCALES_KEY):
            raise ValueError(
                "direction_dtype must be 'int8' to continue this sharded checkpoint, which was "
                "made with it."
            )

    @override
    def measure(self, folds: list[Fold], sharding: Sharding) -> StepMetrics:
        """Measure a finished step; the only communication, where parameters are sharded."""
        params = [p for fold in folds for p in fold.params]
        previous = [m for fold in folds for m in fold.kept]
        rows = sums_of_step(
            [None if m is None else local([m])[0] for m in previous],
            local(m for fold in folds for m in fold.buffers),
            ema_decay=self.ema_decay,
        )
        sums = sharding.sum_over_shards(params, rows)
        return StepMetrics.from_sums(sums, largest_step_size(folds))
