"""Count the steps of an optimizer, in its own checkpoints, and act around some of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ema_nesterov.core.step_hooks import StepHooks, only_creates_state

__all__ = ["StepCounter", "check_count"]

_NO_STEP = -1


class StepCounter:
    """Calls an action before and after each step of an optimizer, with the steps taken before.

    The count is in the optimizer's first parameter group, and so in every checkpoint of it. The
    action after a step comes after all other hooks of that step, whoever registered first.

    Args:
        optimizer: The optimizer.
        key: Key of the count in the parameter group.
        before: Called with the steps taken before, right before the first change of a parameter.
        after: Called with the steps taken, this one included.
        cancel: Called instead of ``after`` where a step raised: before the next one, and before the
            state is saved or loaded.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        key: str,
        *,
        before: Callable[[int], None],
        after: Callable[[int], None],
        cancel: Callable[[], None],
    ) -> None:
        self.optimizer = optimizer
        self.key = key
        self._before, self._after, self._cancel = before, after, cancel
        self._has_begun = False
        self._is_dry_run = False
        self._handles: list[RemovableHandle] = []
        self._hooks = StepHooks(
            optimizer, self._begin, self._end, self._abandon, lambda: self._has_begun
        )
        optimizer.param_groups[0].setdefault(key, _NO_STEP)

    @property
    def num_steps(self) -> int:
        """Steps taken so far."""
        return max(0, int(self.optimizer.param_groups[0].get(self.key, _NO_STEP)))

    def start_at(self, num_steps: int) -> None:
        """Set how many steps the run took before, unless a checkpoint that was loaded tells."""
        if self.optimizer.param_groups[0].get(self.key, _NO_STEP) == _NO_STEP:
            self.optimizer.param_groups[0][self.key] = num_steps

    def attach(self) -> None:
        """Register the hooks."""
        self._handles = [
            *self._hooks.register(),
            self.optimizer.register_state_dict_pre_hook(lambda optimizer: self._hooks.settle()),
            self.optimizer.register_load_state_dict_pre_hook(lambda *args: self._abandon()),
        ]

    def detach(self) -> None:
        """Remove the hooks. The count stays."""
        self._abandon()
        while self._handles:
            self._handles.pop().remove()

    def _begin(self) -> None:
        if not self._handles:
            return  # detached in the closure
        _, after_step, _, before_state, _ = self._handles
        # Others may have been registered since: EMA-Nesterov's end of the step has to come first.
        for handle, hooks in (
            (after_step, self.optimizer._optimizer_step_post_hooks),
            (before_state, self.optimizer._optimizer_state_dict_pre_hooks),
        ):
            cast("OrderedDict[int, Any]", hooks).move_to_end(handle.id)
        self._is_dry_run = only_creates_state(self.optimizer)
        self._has_begun = True
        if not self._is_dry_run:
            self._before(self.num_steps)

    def _end(self) -> None:
        self._has_begun = False
        if not self._is_dry_run:
            self.optimizer.param_groups[0][self.key] = self.num_steps + 1
            self._after(self.num_steps)

    def _abandon(self) -> None:
        if self._has_begun:
            self._has_begun = False
            self._hooks.reset()
            if not self._is_dry_run:
                self._cancel()


def check_count(name: str, value: object, least: int) -> None:
    """Raise unless ``value`` is a whole number that is at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
