"""One :class:`Lookahead` per base optimizer: where its parameters are, and when they move."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lightning_ema_nesterov.core.metrics import StepMetrics
from lightning_ema_nesterov.core.rule import Fold, Method
from lightning_ema_nesterov.core.schedule import MAX_LR_KEY, LookaheadSchedule, follow_lr
from lightning_ema_nesterov.core.sharding import Sharding
from lightning_ema_nesterov.core.stage import Pause, Stage
from lightning_ema_nesterov.core.step_hooks import StepHooks

__all__ = ["STEP_KEY", "Lookahead", "Stage"]

STEP_KEY = "ema_nesterov_step"
"""Key of the number of steps taken, in the base optimizer's first parameter group."""

_NO_STEP = -1


class Lookahead:
    r"""A lookahead method around one base optimizer, which stays the object that the user made.

    The owner calls :meth:`extrapolate` before each training forward pass. Hooks on the base
    optimizer do the rest: the fold before it changes a parameter, the next direction after it.

    A parameter without a gradient takes no step: it returns to its iterate and keeps its direction,
    as the base optimizer leaves it and its state alone. A parameter with ``requires_grad=False`` is
    not touched.

    Args:
        base_optimizer: The optimizer to look ahead for. Its ``step`` must call its closure.
        schedule: Step size :math:`\beta_t` for each step.
        method: What is kept for each parameter, and how a step updates it.
        module: The outermost module; needed where FSDP shards it.

    Attributes:
        stage: What the parameters hold.
        will_measure: Whether the next step is measured; reset by it.
        keeps_shards: Whether shards keep their tensors, as zeros, in the rest. A distributed
            checkpoint without them is refused, unless the loader forgets them first.
        metrics: The step that was measured last.

    Raises:
        TypeError: If ``base_optimizer`` is not a ``torch.optim.Optimizer``.

    Example:
        >>> import torch
        >>> from lightning_ema_nesterov.rules.ema import EMADirections
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.25)
        >>> directions = EMADirections(optimizer, ema_decay=0.5)
        >>> lookahead = Lookahead(optimizer, LookaheadSchedule(0.5), directions).attach()
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     lookahead.extrapolate()
        ...     (0.5 * weight.square()).sum().backward()
        ...     optimizer.step()
        >>> weight.item()  # m = -0.125, so y = 0.75 - 0.0625 and x = 0.75 * y
        0.515625
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        schedule: LookaheadSchedule,
        method: Method,
        *,
        module: nn.Module | None = None,
    ) -> None:
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(
                "base_optimizer must be a torch.optim.Optimizer, got "
                f"{type(base_optimizer).__module__}.{type(base_optimizer).__qualname__}."
            )
        self.base_optimizer = base_optimizer
        self.schedule = schedule
        self.sharding = Sharding(module, base_optimizer)
        self.method = method
        self.stage = Stage.ITERATE
        self.will_measure = False
        self.keeps_shards = True
        self.metrics: StepMetrics | None = None
        self._pause: Pause | None = None
        self._step_sizes: dict[Tensor, float] = {}  # parameters at y, and their beta_t
        self._folds: list[Fold] = []
        self._is_dry_run = False
        self._hooks = StepHooks(base_optimizer, self._begin_step, self._end_step)
        self._handles: list[RemovableHandle] = []

    @property
    def step_idx(self) -> int:
        """Steps taken so far, kept in the first parameter group: it is saved with the optimizer."""
        return max(0, int(self.base_optimizer.param_groups[0].get(STEP_KEY, _NO_STEP)))

    @step_idx.setter
    def step_idx(self, value: int) -> None:
        self.base_optimizer.param_groups[0][STEP_KEY] = value

    @property
    def is_new(self) -> bool:
        """Whether no step was taken, or loaded, with EMA-Nesterov."""
        return int(self.base_optimizer.param_groups[0].get(STEP_KEY, _NO_STEP)) == _NO_STEP

    def attach(self) -> Self:
        """Register the hooks on the base optimizer and fix each group's learning-rate reference."""
        if self._handles:
            return self
        optimizer = self.base_optimizer
        self._handles = [
            *self._hooks.register(),
            *self.method.keep_dtype_on_load(),
            optimizer.register_state_dict_pre_hook(lambda _: self.method.make_whole()),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        optimizer.param_groups[0].setdefault(STEP_KEY, _NO_STEP)  # a place to load it to
        for group in optimizer.param_groups:
            follow_lr(group)
        return self

    def detach(self) -> None:
        """Return the parameters to the iterate and remove the hooks. The state stays."""
        self.retract()
        while self._handles:
            self._handles.pop().remove()

    def forget(self) -> None:
        """Detach, and remove from the parameter groups what :meth:`attach` put there."""
        self.detach()
        for group in self.base_optimizer.param_groups:
            group.pop(STEP_KEY, None)
            group.pop(MAX_LR_KEY, None)

    def extrapolate(self) -> None:
        """Move the parameters to the lookahead point, unless they are there.

        The step size is computed here, once for the window up to the base optimizer's step.
        """
        if self.stage is Stage.PAUSED:
            self.resume()
        elif self.stage is Stage.STEPPING and not self._hooks.is_in_closure:
            self.retract()  # the last step of the base optimizer raised, and training goes on
        if self.stage is not Stage.ITERATE:
            return
        self.stage = Stage.LOOKAHEAD
        for group in self.base_optimizer.param_groups:
            step_size = self.schedule.step_size(self.step_idx, follow_lr(group))
            params = [p for p in group["params"] if p.requires_grad and self.method.has(p)]
            if step_size and params:
                self.sharding.reshard()
                self.method.extrapolate(params, step_size)
                self._step_sizes.update(dict.fromkeys(params, step_size))

    def retract(self) -> None:
        """Return the parameters to the iterate for good: no step follows from where they are.

        After an exception inside the base optimizer's step, parameters that it changed count as
        stepped, the others go back.
        """
        self.method.make_whole()
        if self.stage is Stage.ITERATE:
            return
        if self.stage is not Stage.PAUSED:
            self._restore_iterate()
        self._hooks.reset()
        self._close_window()

    def skip(self) -> None:
        """Close a window whose step was skipped: back to the iterate, and the schedule goes on."""
        if self.stage is not Stage.ITERATE:
            self.retract()
            self.method.finish([], step_idx=self.step_idx)
            self.step_idx += 1

    def pause(self) -> None:
        """Return the parameters to the iterate until :meth:`extrapolate` or :meth:`resume`.

        A copy of the changed tensors is kept aside, so that training goes on from the same numbers.
        """
        if self.stage is Stage.ITERATE:
            self.method.make_whole()
        if self.stage in (Stage.ITERATE, Stage.PAUSED):
            return
        self.sharding.reshard()
        begun = dict(self.method.begun)
        changed = dict.fromkeys([*self._step_sizes, *self.method.tensors_of(list(begun))])
        for fold in self._folds:
            own = self.method.tensors_of(fold.params)
            changed.update(dict.fromkeys([*fold.params, *fold.buffers, *own]))
        kept = [(tensor, tensor.detach().clone()) for tensor in changed]
        self._pause = Pause(self.stage, kept, begun)
        self._restore_iterate()
        self.stage = Stage.PAUSED

    def resume(self) -> None:
        """Put back, bit for bit, what :meth:`pause` kept aside."""
        if self._pause is None:
            return
        self.sharding.reshard()
        for tensor, kept in self._pause.kept:
            # `.data` hides the change from autograd: the tensors that it saved are whole again.
            tensor.data.copy_(kept)
        self.method.begun.update(self._pause.begun)
        self.stage, self._pause = self._pause.stage, None

    @contextmanager
    def at_iterate(self) -> Iterator[None]:
        """Hold the parameters at the iterate, and the state whole, inside a ``with`` block."""
        was_paused = self.stage is Stage.PAUSED
        self.pause()
        try:
            yield
        finally:
            if not was_paused:
                self.resume()

    def _begin_step(self) -> None:
        # torch.distributed.checkpoint makes a base optimizer create its state by a step with
        # gradients and learning rates of zero, outside of training.
        groups = self.base_optimizer.param_groups
        lrs = (float(group.get("lr", 1.0)) for group in groups)  # read outside of training only
        self._is_dry_run = self.stage is Stage.ITERATE and not any(lrs)
        self.resume()
        if self._scaler_skips_step():
            self._restore_iterate()
        elif self.schedule.is_resting(self.step_idx):
            self.method.free(keeps_shards=self.keeps_shards)
        else:
            params = [p for group in groups for p in group["params"]]
            for step_size, bucket in self._by_step_size(p for p in params if p.grad is None):
                self._retract(bucket, step_size)
            for step_size, bucket in self._by_step_size(p for p in params if p.grad is not None):
                fold = self.method.begin(bucket, step_size, is_measured=self.will_measure)
                self._folds.append(fold)
        self.stage = Stage.STEPPING

    def _scaler_skips_step(self) -> bool:
        # GradScaler calls a fused optimizer for a skipped step too, and the optimizer skips it.
        found_inf = getattr(self.base_optimizer, "found_inf", None)
        return found_inf is not None and bool(found_inf.item() > 0)

    def _end_step(self) -> None:
        is_resting = self.schedule.is_resting(self.step_idx)
        if not is_resting:
            self.method.finish(self._folds, step_idx=self.step_idx)
        if self._is_dry_run:
            for fold in self._folds:
                self.method.restart(fold.params)
        else:
            if self.will_measure and is_resting:
                self.metrics = StepMetrics(step_size=0.0)
            elif self.will_measure:
                self.metrics = self.method.measure(self._folds, self.sharding)
            self.will_measure = False
            self.step_idx += 1
        self._close_window()

    def _after_load(self, optimizer: Optimizer) -> None:
        self._close_window()  # whoever loads the optimizer loads the iterates too

    def _restore_iterate(self) -> None:
        self.sharding.reshard()
        if self.stage is Stage.LOOKAHEAD:
            for step_size, params in self._by_step_size(self._step_sizes):
                self._retract(params, step_size)
        for fold in self._folds:
            self._retract(self.method.settle(fold), fold.step_size)

    def _retract(self, params: list[Tensor], step_size: float) -> None:
        if step_size:
            self.method.retract(params, step_size)

    def _close_window(self) -> None:
        self.stage = Stage.ITERATE
        self._pause = None
        self._step_sizes, self._folds = {}, []
        self.method.begun.clear()

    def _by_step_size(self, params: Iterable[Tensor]) -> list[tuple[float, list[Tensor]]]:
        buckets: dict[float, list[Tensor]] = defaultdict(list)
        for p in params:
            buckets[self._step_sizes.get(p, 0.0)].append(p)
        return list(buckets.items())
