"""Two moments of one optimizer's step: right before it changes a parameter, and right after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["StepHooks"]


class StepHooks:
    """Calls ``begin`` and ``end`` around what a base optimizer's step does to its parameters.

    With a closure ``begin`` comes after its first call: its forward and backward pass belong
    to the point from before the step. A subclass whose ``step`` calls ``super().step()`` fires
    torch's hooks twice; the outermost pair counts.

    Args:
        base_optimizer: The optimizer. Its ``step`` must call the closure that it is given.
        begin: Called before the first change.
        end: Called after the last one; not after an exception.
    """

    def __init__(
        self, base_optimizer: Optimizer, begin: Callable[[], None], end: Callable[[], None]
    ) -> None:
        self.base_optimizer = base_optimizer
        self.is_in_closure = False
        self._begin = begin
        self._end = end
        self._has_begun = False
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
        self._has_begun = False

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._depth += 1
        if self._depth > 1:
            return None
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._then_begin(kwargs["closure"])}
        if len(args) > 1 and args[1] is not None:
            return (args[0], self._then_begin(args[1]), *args[2:]), kwargs
        self._begin_once()
        return None

    def _then_begin(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        versions = self._versions()

        def closure_then_begin() -> Any:
            if not self._has_begun and self._versions() != versions:
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
            self._begin_once()
            return loss

        return closure_then_begin

    def _versions(self) -> list[int]:
        groups = self.base_optimizer.param_groups
        return [p._version for group in groups for p in group["params"]]

    def _begin_once(self) -> None:
        if not self._has_begun:
            self._begin()
            self._has_begun = True

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        has_begun = self._has_begun
        self.reset()
        if not has_begun:
            raise RuntimeError(
                f"{type(optimizer).__qualname__}.step() must call the closure it is given, and did "
                "not. EMA-Nesterov updates its direction between the closure and the step."
            )
        self._end()
