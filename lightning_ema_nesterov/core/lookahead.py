"""One :class:`Lookahead` per base optimizer: where its parameters are, and when they move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.profiler import record_function
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lightning_ema_nesterov.core.checks import check_share
from lightning_ema_nesterov.core.claims import claim, release
from lightning_ema_nesterov.core.interrupts import uninterrupted
from lightning_ema_nesterov.core.metrics import StepMetrics
from lightning_ema_nesterov.core.progress import Progress
from lightning_ema_nesterov.core.rule import LookaheadRule
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.core.scope import Scope
from lightning_ema_nesterov.core.sharding import Sharding
from lightning_ema_nesterov.core.step_hooks import StepHooks, only_creates_state, skipped_by_scaler
from lightning_ema_nesterov.core.window import AtAverage, Window

__all__ = ["Lookahead"]


class Lookahead:
    r"""A lookahead rule at work on its base optimizer, which stays the object that the user made.

    The owner calls :meth:`extrapolate` before each training forward pass. Hooks on the base
    optimizer do what follows: the update begins before it changes a parameter, and ends after it.
    Up to there a :class:`Window` is open. Without one, parameters hold the iterate.

    A parameter without a gradient takes no step: it returns to its iterate and keeps its direction.
    A parameter with ``requires_grad=False`` is not touched.

    Args:
        rule: What is kept for each parameter of its base optimizer, and how a step updates it. The
            optimizer's ``step`` must call its closure.
        schedule: Step size :math:`\beta_t` for each step; parameter groups may have another peak.
        module: The outermost module; needed where FSDP shards it.

    Attributes:
        progress: Steps taken, and what the step size is relative to; saved with the optimizer.
        will_measure: Whether the next step is measured; reset by it.
        metrics: The step that was measured last.
        was_extrapolated: Whether :meth:`extrapolate` was called before the step that was last.
        follows_module: Whether calls of a module move the parameters, and no owner that asks.

    Example:
        >>> import torch
        >>> from lightning_ema_nesterov.rules.ema import EMADirections
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.25)
        >>> rule = EMADirections(optimizer, ema_decay=0.5)
        >>> lookahead = Lookahead(rule, LookaheadSchedule(0.5)).attach()
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     lookahead.extrapolate()
        ...     (0.5 * weight.square()).sum().backward()
        ...     optimizer.step()
        >>> weight.item()  # m = -0.125, so y = 0.75 - 0.0625 and x = 0.75 * y
        0.515625
    """

    def __init__(
        self, rule: LookaheadRule, schedule: LookaheadSchedule, *, module: nn.Module | None = None
    ) -> None:
        self.rule = rule
        self.schedule = schedule
        self.progress = Progress(rule.base_optimizer, module, rule.average_decay)
        self.sharding = Sharding(module, rule.base_optimizer)
        self.scope = Scope(rule)
        self.will_measure = False
        self.metrics: StepMetrics | None = None
        self.was_extrapolated = False
        self.follows_module = False
        self._window: Window | None = None
        self._average: AtAverage | None = None
        self._hooks = StepHooks(
            rule.base_optimizer,
            self._begin_step,
            self._end_step,
            abandon=self.retract,
            has_begun=self._is_stepping,
        )
        self._handles: list[RemovableHandle] = []

    @property
    def base_optimizer(self) -> Optimizer:
        """The optimizer of the rule."""
        return self.rule.base_optimizer

    @property
    def step_idx(self) -> int:
        """Steps taken so far."""
        return self.progress.step_idx

    def attach(self) -> Self:
        """Register the hooks on the base optimizer and take up where a checkpoint left.

        Raises:
            RuntimeError: If a lookahead method is attached to the optimizer already.
            ValueError: If the step size of a parameter group is out of its range.
        """
        if self._handles:
            return self
        self.scope.peaks(self.schedule)
        claim(self)
        self.rule.store.take_up(self.rule.restore)
        self._handles = [
            *self._hooks.register(),
            *self.progress.register(),
            *self.rule.store.restore_on_load(self.rule.restore),
            *self.scope.keep_on_load(),
            self.base_optimizer.register_state_dict_pre_hook(self._before_state),
            self.base_optimizer.register_load_state_dict_pre_hook(self._before_load),
        ]
        return self

    def detach(self, *, leaves_progress: bool = True) -> None:
        """Return the parameters to the iterate and remove the hooks. The state stays.

        Args:
            leaves_progress: Whether the parameter groups get what a later checkpoint needs.
        """
        self.retract()
        self.rule.store.bring_back()
        if self._handles:
            release(self.base_optimizer)
            if leaves_progress:
                self.progress.leave()
        while self._handles:
            self._handles.pop().remove()

    @uninterrupted
    def extrapolate(self) -> None:
        """Move the parameters to the lookahead point, unless they are there.

        Raises:
            RuntimeError: If the parameters hold the average.
        """
        if self._average is not None:
            raise RuntimeError(
                "A training forward pass must not run while the parameters hold the average: leave "
                "at_average() first."
            )
        self.resume()
        if self._is_stepping() and not self._hooks.is_in_closure:
            self._hooks.settle()  # the last step raised, and training continues
        if self._window is not None:
            return
        self._window = Window(self.rule, self.sharding, step_idx=self.step_idx)
        with record_function("ema_nesterov/extrapolate"):
            for step_size, params in self.scope.by_step_size(self.schedule, self.progress):
                self._window.extrapolate(params, step_size)

    @uninterrupted
    def retract(self) -> None:
        """Return the parameters to the iterate for good: no step follows from where they are."""
        self.leave_average()
        self.rule.make_state_readable()
        if self._window is not None:
            self._window.to_iterate()
        self._hooks.reset()
        self._window = None

    @uninterrupted
    def skip(self) -> None:
        """Close a window whose step was skipped: back to the iterate, and the step counts."""
        if self._window is not None:
            self.retract()
            self.rule.after_step(self.step_idx)
            self.progress.step_idx += 1

    @uninterrupted
    def pause(self) -> None:
        """Return the parameters to the iterate until :meth:`extrapolate` or :meth:`resume`."""
        if self._window is None:
            self.rule.make_state_readable()
        else:
            self._window.pause()

    @property
    def is_open(self) -> bool:
        """Whether a window is open, and nobody looks at the iterate in it."""
        return self._window is not None and not self.is_paused

    @property
    def is_paused(self) -> bool:
        """Whether somebody looks at the iterate in a window that is open."""
        return self._window is not None and self._window.is_paused

    @property
    def is_at_average(self) -> bool:
        """Whether the parameters hold the average."""
        return self._average is not None

    @uninterrupted
    def resume(self) -> None:
        """Put back, bit for bit, what :meth:`pause` put aside."""
        self.leave_average()
        if self._window is not None:
            self._window.resume()

    @contextmanager
    def at_iterate(self) -> Iterator[None]:
        """Hold the parameters at the iterate, and the state readable, inside a ``with`` block."""
        was_open, average = self.is_open, self._average
        self.leave_average()
        self.pause()
        try:
            yield
        finally:
            if was_open:
                self.resume()
            if average is not None:
                self.enter_average(average.share)

    @contextmanager
    def at_average(self, share: float = 1.0) -> Iterator[None]:
        """Hold the parameters at the average inside a ``with`` block, then as they were before."""
        was_open, outer = self.is_open, self._average
        self.enter_average(share)
        try:
            yield
        finally:
            self.leave_average()
            if was_open:
                self.resume()
            if outer is not None:
                self.enter_average(outer.share)

    @uninterrupted
    def enter_average(self, share: float = 1.0) -> None:
        """Move the parameters to the average of the iterates until :meth:`leave_average`.

        Raises:
            TypeError: If the rule holds no average.
            ValueError: If ``share``, of the way from the iterate to the average, is not in [0, 1].
        """
        check_share("share", share)
        self.leave_average()
        self.pause()
        self._average = AtAverage(self.rule, self.sharding, share)

    @uninterrupted
    def leave_average(self) -> None:
        """Return from the average to the iterate, bit for bit; nothing where they are not there."""
        if self._average is not None:
            self._average.leave()
            self._average = None

    def _is_stepping(self) -> bool:
        return self._window is not None and self._window.is_stepping

    def _before_state(self, optimizer: Optimizer) -> None:
        if not self.is_paused:
            self._hooks.settle()
        self.rule.make_state_readable()

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self.retract()  # whatever is loaded, parameters that nobody loads stay at the iterate

    @uninterrupted
    def _begin_step(self) -> None:
        if not self._handles:
            return  # detached in the closure
        self.resume()
        self.was_extrapolated = self._window is not None
        is_dry_run = self._window is None and only_creates_state(self.base_optimizer)
        window = self._window = self._window or Window(
            self.rule, self.sharding, step_idx=self.step_idx, is_dry_run=is_dry_run
        )
        is_skipped = is_dry_run or skipped_by_scaler(self.base_optimizer)
        params = [] if is_skipped else self.rule.store.all_params()
        with record_function("ema_nesterov/begin"):
            window.begin(params, is_measured=self.will_measure)

    @uninterrupted
    def _end_step(self) -> None:
        window = self._window
        if window is None:
            return
        if window.is_dry_run:
            self.rule.store.fill_stepped(self.rule.make_state)
        else:
            with record_function("ema_nesterov/finish"):
                for fold in window.folds:
                    self.rule.finish(fold, step_idx=self.step_idx)
                self.rule.after_step(self.step_idx)
            if self.will_measure:
                self.metrics = self.rule.measure(window.folds, self.sharding)
                self.will_measure = False
            self.progress.step_idx += 1
        self.rule.store.fill_missing(self.rule.make_state)
        self._window = None
