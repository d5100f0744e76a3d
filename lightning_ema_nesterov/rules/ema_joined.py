"""EMA directions in as few passes over memory as possible, by a compiled kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ema_nesterov.core.checks import warn_on_rank_zero
from lightning_ema_nesterov.core.equations import (
    begin_update_,
    cancel_update_,
    extrapolate_,
    finish_update_,
    fold_decay,
    join_,
    join_coefficients,
)
from lightning_ema_nesterov.core.metrics import StepMetrics
from lightning_ema_nesterov.core.narrow import is_narrow
from lightning_ema_nesterov.core.rule import Fold
from lightning_ema_nesterov.core.sharding import Sharding, local
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY, EMADirections

__all__ = ["JoinedDirections"]

_MIN_ELEMENTS = 2**16
"""Elements below which the call of a compiled kernel costs more than several foreach operations."""

_CACHED_ELEMENTS = 2**19
"""Elements that a cache of the CPU holds twice, for several operations one after the other."""

# One compiled kernel for the process: its guards and code do not depend on the optimizer.
_compiled: Callable[[Tensor, Tensor, Tensor], None] = torch.compile(
    join_, dynamic=True, fullgraph=True
)


class JoinedDirections(EMADirections):
    r"""EMA directions whose passes over memory are joined.

    Extrapolating and beginning the update are one pass: from the forward pass to the base
    optimizer's step the storage of a direction holds the fold, unless the state is made readable.
    Where the owner of the training loop knows that nobody reads the state or changes a parameter
    between the base optimizer's step and the next forward pass, the end of the update joins too.

    Going back, :math:`m = (b + (1 - \gamma)\, y) / \rho` has an error of about one unit in the last
    place of :math:`(1 - \gamma)\, y`, and so the iterate of one in its own.

    Args:
        base_optimizer: The optimizer whose state holds the directions.
        ema_decay: Weight :math:`\gamma` of the past, in [0, 1).
        ends_late: Whether the end of an update waits for the next extrapolation, or for
            :meth:`make_state_readable`. Parameters must not be changed in between.
    """

    def __init__(
        self, base_optimizer: Optimizer, ema_decay: float, *, ends_late: bool = False
    ) -> None:
        super().__init__(base_optimizer, ema_decay)
        self.ends_late = ends_late
        # Parameters whose direction's storage holds a fold: at y with a step size, or stepped.
        self._begun: dict[Tensor, tuple[Tensor, float]] = {}
        self._late: dict[Tensor, Tensor] = {}
        self._left_out: set[Tensor] = set()
        self._can_compile = True

    @override
    def extrapolate(self, params: list[Tensor], step_size: float) -> None:
        # A parameter that often has no gradient would collect the rounding of going back.
        is_joined = fold_decay(self.ema_decay, step_size) >= 0.5
        left_out = self._left_out
        joined = [p for p in params if is_joined and not is_narrow(p) and p not in left_out]
        self._drop_replaced()
        for is_fold in (True, False):
            chosen = [p for p in joined if (p in self._late) is is_fold]
            self._join(chosen, step_size, is_fold=is_fold)
        for p, fold in zip(joined, self.store.column(joined), strict=True):
            self._late.pop(p, None)
            self._begun[p] = fold, step_size
        others = [p for p in params if p not in self._begun]
        self._end(others)
        super().extrapolate(others, step_size)

    @override
    def retract(self, params: list[Tensor], step_size: float) -> None:
        self._drop_replaced()
        self._cancel([p for p in params if p in self._begun])
        super().retract(params, step_size)

    @override
    def make_state_readable(self) -> None:
        self._drop_replaced()
        self._end(list(self._late))
        self._cancel(list(self._begun))

    @override
    def put_aside(self, tensors: Iterable[Tensor]) -> Callable[[], None]:
        begun = dict(self._begun)
        put_back = super().put_aside([*tensors, *(fold for fold, _ in begun.values())])

        def put_back_all() -> None:
            put_back()
            self._begun.update(begun)

        return put_back_all

    @override
    def begin(self, params: list[Tensor], step_size: float, *, is_measured: bool) -> Fold:
        self._end(list(self._late))
        begun = [p for p in params if p in self._begun]
        others = [p for p in params if p not in self._begun]
        fold = super().begin(others, step_size, is_measured=is_measured)
        buffers = self.store.column(begun)
        kept: list[Tensor | None] = [None] * len(begun)
        if is_measured:
            copies = [b.clone() for b in buffers]
            self._cancel_folds(copies, begun, step_size)
            kept = [*copies]
        for p in begun:
            del self._begun[p]
        return Fold(fold.params + begun, step_size, fold.buffers + buffers, [*fold.kept, *kept])

    @override
    def finish(self, fold: Fold, *, step_idx: int) -> None:
        self._left_out.difference_update(fold.params)
        is_late = [self.ends_late and self.store.has(p) for p in fold.params]
        rows = list(zip(fold.params, fold.buffers, is_late, strict=True))
        self._late.update((p, b) for p, b, late in rows if late)
        now = [(p, b) for p, b, late in rows if not late]
        self._finish([p for p, _ in now], [b for _, b in now])

    @override
    def measure(self, folds: list[Fold], sharding: Sharding) -> StepMetrics:
        """Make the directions readable, and measure a finished step."""
        self.make_state_readable()
        return super().measure(folds, sharding)

    @torch.no_grad()
    def _join(self, params: list[Tensor], step_size: float, *, is_fold: bool) -> None:
        points, directions = local(p.detach() for p in params), local(self.store.column(params))
        small: list[tuple[Tensor, Tensor]] = []
        made: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        for y, m in zip(points, directions, strict=True):
            if not (self._can_compile and _is_worth_compiling(y, m)):
                small.append((y, m))
                continue
            key = m.dtype, m.device
            if key not in made:
                made[key] = join_coefficients(
                    m, ema_decay=self.ema_decay, step_size=step_size, is_fold=is_fold
                )
            try:
                # `.data` of a view is none to the compiler, which would guard on its base.
                _compiled(m.view(-1).data, y.view(-1).data, made[key])
            except Exception as error:  # torch has many for what it cannot compile
                self._can_compile = False
                _warn_that_nothing_compiles(error)
                small.append((y, m))
        for group in _groups_in_cache(small):
            ys, ms = [y for y, _ in group], [m for _, m in group]
            if is_fold:
                finish_update_(ms, ys, ema_decay=self.ema_decay)
            extrapolate_(ys, ms, step_size=step_size)
            begin_update_(ms, ys, ema_decay=self.ema_decay, step_size=step_size)

    def _drop_replaced(self) -> None:
        # Whoever loads or clears the optimizer's state has ended its updates.
        def is_there(p: Tensor, fold: Tensor) -> bool:
            return self.store.state_of(p).get(DIRECTION_KEY) is fold

        self._late = {p: fold for p, fold in self._late.items() if is_there(p, fold)}
        self._begun = {p: pair for p, pair in self._begun.items() if is_there(p, pair[0])}

    def _end(self, params: list[Tensor]) -> None:
        self._drop_replaced()
        late = [p for p in params if p in self._late]
        self._finish(late, [self._late.pop(p) for p in late])

    def _cancel(self, params: list[Tensor]) -> None:
        for p in params:
            fold, step_size = self._begun.pop(p)
            self._cancel_folds([fold], [p], step_size)
        self._left_out.update(params)

    def _cancel_folds(self, folds: list[Tensor], points: list[Tensor], step_size: float) -> None:
        cancel_update_(local(folds), local(points), ema_decay=self.ema_decay, step_size=step_size)


def _is_worth_compiling(y: Tensor, m: Tensor) -> bool:
    is_flat = y.is_contiguous() and m.is_contiguous()
    is_real = m.dtype == y.dtype and m.dtype in (torch.float32, torch.float64)
    return is_flat and is_real and y.numel() >= _MIN_ELEMENTS


def _groups_in_cache(
    pairs: Sequence[tuple[Tensor, Tensor]],
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Split pairs so that several operations on a group find it in the cache of a CPU."""
    group: list[tuple[Tensor, Tensor]] = []
    num_elements = 0
    for y, m in pairs:
        if group and y.device.type == "cpu" and num_elements + y.numel() > _CACHED_ELEMENTS:
            yield group
            group, num_elements = [], 0
        group.append((y, m))
        num_elements += y.numel()
    if group:
        yield group


def _warn_that_nothing_compiles(error: Exception) -> None:
    message = str(error).strip().splitlines() or [""]
    warn_on_rank_zero(
        "compile=True needs a compiler that torch.compile can use, and none works here: "
        f"EMA-Nesterov goes on without. {type(error).__name__}: {message[0]}"
    )
