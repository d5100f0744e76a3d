"""Two moments of one optimizer's step: right before it changes a parameter, and right after."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["StepHooks"]


class StepHooks:
    """Calls ``begin`` and ``end`` around what a base optimizer's step does to its parameters.

    With a closure ``begin`` comes after its first call: its forward and backward pass belong
    to the point from before the step. A subclass whose ``step`` calls ``super().step()`` fires
    torch's hooks twice; the outermost pair counts. Whether a step has begun, the owner knows.

    Args:
        base_optimizer: The optimizer. Its ``step`` must call the closure that it is given.
        begin: Called before the first change.
        end: Called after the last one; not after an exception.
        has_begun: Tells whether ``begin`` was called and ``end`` not yet.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        begin: Callable[[], None],
        end: Callable[[], None],
        has_begun: Callable[[], bool],
    ) -> None:
        self.base_optimizer = base_optimizer
        self.is_in_closure = False
        self._begin = begin
        self._end = end
        self._has_begun = has_begun
        self._depth = 0

    def register(self) -> list[RemovableHandle]:
        """Register the hooks on the base optimizer."""
        return [
            self.base_optimizer.register_step_pre_hook(self._before_step),
            self.base_optimizer.register_step_post_hook(self._after_step),
        ]

    def reset(self) -> None:
        """Forget a step that raised: its end will not come."""
        self._depth = 0

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._depth and not self._is_nested():
            self.reset()  # the last step raised, and its end never came
        self._depth += 1
        if self._depth > 1:
            return None
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._then_begin(kwargs["closure"])}
        if len(args) > 1 and args[1] is not None:
            return (args[0], self._then_begin(args[1]), *args[2:]), kwargs
        self._begin()
        return None

    def _is_nested(self) -> bool:
        """Return whether another step of the same optimizer is running around this one."""
        hook = inspect.currentframe()
        wrapper = hook.f_back.f_back if hook and hook.f_back else None  # torch's, of this step
        frame: FrameType | None = wrapper.f_back if wrapper else None
        while frame is not None and wrapper is not None:
            if frame.f_code is wrapper.f_code:
                args = frame.f_locals.get("args") or (None,)
                if args[0] is self.base_optimizer:
                    return True
            frame = frame.f_back
        return False

    def _then_begin(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        versions = self._versions()
        num_calls = 0

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
            if num_calls == 1:
                self._begin()
            return loss

        return closure_then_begin

    def _versions(self) -> list[int]:
        groups = self.base_optimizer.param_groups
        return [p._version for group in groups for p in group["params"]]

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        self.reset()
        if not self._has_begun():
            raise RuntimeError(
                f"{type(optimizer).__qualname__}.step() must call the closure it is given, and did "
                "not. EMA-Nesterov updates its direction between the closure and the step."
            )
        self._end()
