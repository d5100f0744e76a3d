"""One :class:`Lookahead` per base optimizer: at which point its parameters are, and the EMA direction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lightning_ema_nesterov.functional import (
    begin_update_,
    cancel_update_,
    extrapolate_,
    finish_update_,
    retract_,
)
from lightning_ema_nesterov.metrics import StepMetrics, measure_step
from lightning_ema_nesterov.schedule import LookaheadSchedule, check_unit_interval, follow_lr

__all__ = ["DIRECTION_KEY", "STEP_KEY", "Lookahead", "Stage"]

DIRECTION_KEY = "ema_nesterov_direction"
"""Key of the EMA direction in the base optimizer's state of a parameter."""

STEP_KEY = "ema_nesterov_step"
"""Key of the number of steps taken, in the base optimizer's first parameter group."""


class Stage(Enum):
    """What the parameters hold."""

    ITERATE = "the iterate x"
    LOOKAHEAD = "the lookahead point y"
    STEPPING = "what the base optimizer writes; the direction's storage holds the fold"
    PAUSED = "the iterate x, while what the stage before held is kept aside"


@dataclass
class _Fold:
    """Parameters that the base optimizer steps together with one step size."""

    params: list[Tensor]
    buffers: list[Tensor]
    step_size: float
    versions: list[int]


@dataclass
class _Pause:
    """What :meth:`Lookahead.resume` puts back."""

    stage: Stage
    kept: list[tuple[Tensor, Tensor]]


class Lookahead:
    r"""EMA-Nesterov around one base optimizer, which stays the object that the user made.

    The owner calls :meth:`extrapolate` before each training forward pass. Hooks on the base optimizer
    do the rest: the fold before it changes a parameter, the next EMA direction after it. The direction
    lives in ``base_optimizer.state[p]["ema_nesterov_direction"]``: one tensor per parameter, of its
    shape, in float32 or the parameter's dtype where that is wider.

    A parameter without a gradient takes no step: it returns to its iterate and keeps its direction,
    as the base optimizer leaves it and its state alone. A parameter with ``requires_grad=False`` is
    not touched.

    Args:
        base_optimizer: The optimizer to look ahead for. Its ``step`` must call the closure it is given.
        schedule: Step size :math:`\beta_t` for each step.
        ema_decay: Weight :math:`\gamma` of the past, in [0, 1).

    Raises:
        TypeError: If ``base_optimizer`` is not a ``torch.optim.Optimizer``.
        ValueError: If ``ema_decay`` is not in [0, 1).

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.25)
        >>> lookahead = Lookahead(optimizer, LookaheadSchedule(0.5), ema_decay=0.5).attach()
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     lookahead.extrapolate()
        ...     (0.5 * weight.square()).sum().backward()
        ...     optimizer.step()
        >>> weight.item()  # m = -0.125, so y = 0.75 - 0.0625 and x = 0.75 * y
        0.515625
    """

    def __init__(
        self, base_optimizer: Optimizer, schedule: LookaheadSchedule, *, ema_decay: float
    ) -> None:
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(
                "base_optimizer must be a torch.optim.Optimizer, got "
                f"{type(base_optimizer).__module__}.{type(base_optimizer).__qualname__}."
            )
        check_unit_interval("ema_decay", ema_decay)
        self.base_optimizer = base_optimizer
        self.schedule = schedule
        self.ema_decay = ema_decay
        self.will_measure = False
        self._stage = Stage.ITERATE
        self._pause: _Pause | None = None
        self._step_sizes: dict[Tensor, float] = {}
        self._folds: list[_Fold] = []
        self._previous_directions: dict[Tensor, Tensor] = {}
        self._metrics: StepMetrics | None = None
        self._step_depth = 0
        self._in_closure = False
        self._loaded_directions: list[Tensor | None] = []
        self._handles: list[RemovableHandle] = []

    @property
    def stage(self) -> Stage:
        """What the parameters hold."""
        return self._stage

    @property
    def step_idx(self) -> int:
        """Steps taken so far. Kept in the first parameter group, so that it is saved with the optimizer."""
        return int(self.base_optimizer.param_groups[0].get(STEP_KEY, 0))

    @step_idx.setter
    def step_idx(self, value: int) -> None:
        self.base_optimizer.param_groups[0][STEP_KEY] = value

    @property
    def has_step_idx(self) -> bool:
        """Whether the base optimizer's state was ever trained, or loaded, with EMA-Nesterov."""
        return STEP_KEY in self.base_optimizer.param_groups[0]

    def attach(self) -> Self:
        """Register the hooks on the base optimizer and fix each group's learning-rate reference."""
        optimizer = self.base_optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        for group in optimizer.param_groups:
            follow_lr(group)
        return self

    def detach(self) -> None:
        """Return the parameters to the iterate and remove the hooks. The state stays."""
        self.retract()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # The moves. Each is idempotent.

    def extrapolate(self) -> None:
        """Move the parameters to the lookahead point, unless they are there.

        The step size is computed here, once for the window up to the base optimizer's step.
        """
        if self._stage is Stage.PAUSED:
            self.resume()
        elif self._stage is Stage.STEPPING and not self._in_closure:
            self.retract()  # the last step of the base optimizer raised, and training goes on
        if self._stage is not Stage.ITERATE:
            return
        self._stage = Stage.LOOKAHEAD
        for group in self.base_optimizer.param_groups:
            step_size = self.schedule.step_size(self.step_idx, follow_lr(group))
            params = [p for p in group["params"] if p.requires_grad and self._has_direction(p)]
            if step_size and params:
                extrapolate_(params, self._directions(params), step_size=step_size)
                self._step_sizes.update(dict.fromkeys(params, step_size))

    def retract(self) -> None:
        """Return the parameters to the iterate for good: no step follows from the lookahead point.

        After an exception inside the base optimizer's step, parameters that it changed count as
        stepped, the others go back.
        """
        if self._stage is Stage.PAUSED:
            self._pause = None
        else:
            self._restore_iterate()
        self._clear_window()

    def skip(self) -> None:
        """Close a window whose step was skipped: back to the iterate, and the schedule goes on."""
        if self._stage is not Stage.ITERATE:
            self.retract()
            self.step_idx += 1

    def pause(self) -> None:
        """Return the parameters to the iterate until :meth:`extrapolate` or :meth:`resume`.

        A copy of the changed tensors is kept aside, so that training goes on from the same numbers.
        """
        if self._stage in (Stage.ITERATE, Stage.PAUSED):
            return
        changed = list(self._step_sizes)
        for fold in self._folds:
            changed += fold.params + fold.buffers
        # A parameter in a fold was also extrapolated: a dictionary keeps one copy of each tensor.
        kept = {tensor: tensor.detach().clone() for tensor in changed}
        self._pause = _Pause(self._stage, list(kept.items()))
        self._restore_iterate()
        self._stage = Stage.PAUSED

    def resume(self) -> None:
        """Put back, bit for bit, what :meth:`pause` kept aside.

        Autograd is not told: tensors saved for a backward pass are whole again.
        """
        if self._pause is None:
            return
        for tensor, kept in self._pause.kept:
            tensor.data.copy_(kept)
        self._stage, self._pause = self._pause.stage, None

    @contextmanager
    def at_iterate(self) -> Iterator[None]:
        """Hold the parameters at the iterate, and the state whole, inside a ``with`` block."""
        was_paused = self._stage is Stage.PAUSED
        self.pause()
        try:
            yield
        finally:
            if not was_paused:
                self.resume()

    def take_metrics(self) -> StepMetrics | None:
        """Return what was measured in the last step, once; ``will_measure`` asks for it."""
        metrics, self._metrics = self._metrics, None
        return metrics

    # The base optimizer's hooks.

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # A subclass whose `step` calls `super().step()` fires each hook twice.
        self._step_depth += 1
        if self._step_depth > 1:
            return None
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._fold_after(kwargs["closure"])}
        if len(args) > 1 and args[1] is not None:
            return (args[0], self._fold_after(args[1]), *args[2:]), kwargs
        self._begin_step()
        return None

    def _fold_after(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Fold after the closure's first call: until then its forward and backward pass need y."""

        def closure_then_fold() -> Any:
            self._in_closure = True
            try:
                loss = closure()
            except BaseException:
                self._step_depth = 0  # the post-hook will not fire
                raise
            finally:
                self._in_closure = False
            if self._stage is not Stage.STEPPING:
                self._begin_step()
            return loss

        return closure_then_fold

    def _begin_step(self) -> None:
        self.resume()
        if self._scaler_skips_step():
            self._restore_iterate()
            self._step_sizes.clear()
        else:
            params = [p for group in self.base_optimizer.param_groups for p in group["params"]]
            for step_size, bucket in self._by_step_size(p for p in params if p.grad is None):
                self._retract(bucket, step_size)
            for step_size, bucket in self._by_step_size(p for p in params if p.grad is not None):
                self._folds.append(self._fold(bucket, step_size))
        self._stage = Stage.STEPPING

    def _scaler_skips_step(self) -> bool:
        # GradScaler calls a fused optimizer for a skipped step too, and the optimizer skips it.
        found_inf = getattr(self.base_optimizer, "found_inf", None)
        return found_inf is not None and bool(found_inf.item() > 0)

    def _fold(self, params: list[Tensor], step_size: float) -> _Fold:
        known = [p for p in params if self._has_direction(p)]
        directions = self._directions(known)
        if self.will_measure:
            self._previous_directions.update(
                (p, m.clone()) for p, m in zip(known, directions, strict=True)
            )
        begin_update_(directions, known, ema_decay=self.ema_decay, step_size=step_size)
        # m_0 = 0, so its fold needs the iterate alone. It enters the state after the step: base
        # optimizers take a parameter with any state for one that they have initialised.
        new = [p for p in params if not self._has_direction(p)]
        buffers = [p.detach().to(_direction_dtype(p)).mul(self.ema_decay - 1.0) for p in new]
        params = known + new
        return _Fold(params, directions + buffers, step_size, [p._version for p in params])

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._step_depth -= 1
        if self._step_depth > 0:
            return
        if self._stage is not Stage.STEPPING:
            self.retract()
            raise RuntimeError(
                f"{type(optimizer).__qualname__}.step() must call the closure it is given, and did "
                "not. EMA-Nesterov updates its direction between the closure and the step."
            )
        for fold in self._folds:
            self._finish(fold.params, fold.buffers)
        if self.will_measure:
            self._measure()
        self._clear_window()
        self.step_idx += 1

    def _finish(self, params: list[Tensor], buffers: list[Tensor]) -> None:
        finish_update_(buffers, params, ema_decay=self.ema_decay)
        for p, buffer in zip(params, buffers, strict=True):
            self.base_optimizer.state[p][DIRECTION_KEY] = buffer

    def _measure(self) -> None:
        self.will_measure = False
        params = [p for fold in self._folds for p in fold.params]
        self._metrics = measure_step(
            [self._previous_directions.get(p) for p in params],
            self._directions(params),
            ema_decay=self.ema_decay,
            step_size=max((fold.step_size for fold in self._folds), default=0.0),
        )

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        self._loaded_directions = [
            state_dict["state"].get(key, {}).get(DIRECTION_KEY) for key in keys
        ]

    def _after_load(self, optimizer: Optimizer) -> None:
        # load_state_dict rounds every state to its parameter's dtype.
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for p, loaded in zip(params, self._loaded_directions, strict=True):
            if loaded is not None and optimizer.state[p][DIRECTION_KEY].dtype != _direction_dtype(p):
                optimizer.state[p][DIRECTION_KEY] = loaded.to(p.device, _direction_dtype(p))
        self._loaded_directions = []
        self._pause = None
        self._clear_window()  # whoever loads the optimizer loads the iterates too

    # Small parts.

    def _restore_iterate(self) -> None:
        if self._stage is Stage.LOOKAHEAD:
            for step_size, params in self._by_step_size(self._step_sizes):
                self._retract(params, step_size)
        for fold in self._folds:
            self._settle(fold)

    def _settle(self, fold: _Fold) -> None:
        """End an interrupted step: finish it where the base optimizer wrote, else cancel it."""
        triples = list(zip(fold.params, fold.buffers, fold.versions, strict=True))
        stepped = [(p, b) for p, b, version in triples if p._version != version]
        self._finish([p for p, _ in stepped], [b for _, b in stepped])
        waiting = [(p, b) for p, b, version in triples if p._version == version]
        params = [p for p, _ in waiting]
        cancel_update_(
            [b for _, b in waiting], params, ema_decay=self.ema_decay, step_size=fold.step_size
        )
        self._retract(params, fold.step_size)

    def _retract(self, params: list[Tensor], step_size: float) -> None:
        if step_size:
            # `.data` hides the change from autograd: after a pause the tensors it saved are whole.
            retract_([p.data for p in params], self._directions(params), step_size=step_size)

    def _clear_window(self) -> None:
        self._stage = Stage.ITERATE
        self._step_sizes = {}
        self._folds = []
        self._previous_directions = {}
        self._step_depth = 0

    def _by_step_size(self, params: Iterable[Tensor]) -> list[tuple[float, list[Tensor]]]:
        buckets: dict[float, list[Tensor]] = defaultdict(list)
        for p in params:
            buckets[self._step_sizes.get(p, 0.0)].append(p)
        return list(buckets.items())

    def _has_direction(self, p: Tensor) -> bool:
        # `state` is a defaultdict: indexing it would give every parameter an empty state.
        return DIRECTION_KEY in self.base_optimizer.state.get(p, {})

    def _directions(self, params: list[Tensor]) -> list[Tensor]:
        return [self.base_optimizer.state[p][DIRECTION_KEY] for p in params]


def _direction_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
