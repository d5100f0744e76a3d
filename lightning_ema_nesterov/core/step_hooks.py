"""Two moments of one optimizer's step: right before it changes a parameter, and right after."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ema_nesterov.core.frames import num_running

__all__ = ["StepHooks", "only_creates_state", "skipped_by_scaler"]

_STEP_CODE = Optimizer.profile_hook_step(Optimizer.step).__code__
"""Of what torch puts around the step of every optimizer."""


class StepHooks:
    """Calls ``begin`` and ``end`` around what a base optimizer's step does to its parameters.

    With a closure ``begin`` comes after its first call: its forward and backward pass belong
    to the point from before the step. A subclass whose ``step`` calls ``super().step()`` fires
    torch's hooks twice; the outermost pair counts. Whether a step has begun, the owner knows.

    Args:
        base_optimizer: The optimizer. Its ``step`` must call the closure that it is given.
        begin: Called before the first change.
        end: Called after the last one; not after an exception.
        abandon: Called where a step raised after ``begin``, before the next one and by
            :meth:`settle`.
        has_begun: Tells whether ``begin`` was called, and neither of the others yet.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        begin: Callable[[], None],
        end: Callable[[], None],
        abandon: Callable[[], None],
        has_begun: Callable[[], bool],
    ) -> None:
        self.base_optimizer = base_optimizer
        self.is_in_closure = False
        self._begin = begin
        self._end = end
        self._abandon = abandon
        self._has_begun = has_begun
        self._awaits_closure = False
        self._is_over = False
        self._depth = 0

    def register(self) -> list[RemovableHandle]:
        """Register the hooks on the base optimizer."""
        over = self.base_optimizer.register_step_post_hook(self._note_that_it_is_over)
        hooks = cast("OrderedDict[int, Any]", self.base_optimizer._optimizer_step_post_hooks)
        hooks.move_to_end(over.id, last=False)
        return [
            self.base_optimizer.register_step_pre_hook(self._before_step),
            self.base_optimizer.register_step_post_hook(self._after_step),
            over,
        ]

    def reset(self) -> None:
        """Forget a step that raised: its end will not come."""
        self._depth = 0

    def settle(self) -> None:
        """End or abandon a step that has begun, before somebody reads the state of the optimizer.

        A hook after the step that is older than these reads it when all changes are made. Where no
        step is running, the last one raised. In the middle of a step nothing is done.
        """
        if not self._has_begun():
            return
        if self._is_over:
            self._end()
        elif not self._num_running_steps():
            self._abandon()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._depth and self._num_running_steps() == 1:
            self.reset()  # the last step raised, and its end never came
        if not self._depth and self._has_begun():
            (self._end if self._is_over else self._abandon)()
        self._depth += 1
        if self._depth > 1:
            return None
        self._awaits_closure = self._is_over = False
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._then_begin(kwargs["closure"])}
        if len(args) > 1 and args[1] is not None:
            return (args[0], self._then_begin(args[1]), *args[2:]), kwargs
        self._begin()
        return None

    def _num_running_steps(self) -> int:
        return num_running(
            _STEP_CODE, lambda its: (its.get("args") or (None,))[0] is self.base_optimizer
        )

    def _then_begin(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        versions = self._versions()
        num_calls = 0
        self._awaits_closure = True

        def closure_then_begin() -> Any:
            nonlocal num_calls
            if num_calls == 0 and self._versions() != versions:
                self.reset()
                raise RuntimeError(
                    f"{type(self.base_optimizer).__qualname__}.step() must not change parameters "
                    "before it calls its closure. EMA-Nesterov does not support optimizers that "
                    "take gradients at a point of their own, like SAM."
                )
            self.is_in_closure = True
            try:
                loss = closure()
            except BaseException:
                self.reset()
                raise
            finally:
                self.is_in_closure = False
            num_calls += 1
            self._awaits_closure = False
            if num_calls == 1:
                self._begin()
            return loss

        return closure_then_begin

    def _versions(self) -> list[int]:
        groups = self.base_optimizer.param_groups
        return [p._version for group in groups for p in group["params"]]

    def _note_that_it_is_over(self, *args: Any) -> None:
        self._is_over = self._depth == 1

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        self.reset()
        if self._awaits_closure:
            raise RuntimeError(
                f"{type(optimizer).__qualname__}.step() must call the closure it is given, and did "
                "not. EMA-Nesterov updates its direction between the closure and the step."
            )
        if self._has_begun():  # a hook that came before this one may have settled it
            self._end()


def skipped_by_scaler(optimizer: Optimizer) -> bool:
    """Return whether GradScaler calls a fused optimizer for a step that the optimizer will skip."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item() > 0)


def only_creates_state(optimizer: Optimizer) -> bool:
    """Return whether the step that begins is one for the sake of the optimizer's state alone.

    ``torch.distributed.checkpoint`` has an optimizer without any state create it, by a step with
    gradients and learning rates of zero. They are read on the host outside of training only.
    """
    groups = optimizer.param_groups
    if optimizer.state or any(float(group.get("lr", 1.0)) for group in groups):
        return False
    return not any(p.grad is not None and p.grad.any() for g in groups for p in g["params"])
