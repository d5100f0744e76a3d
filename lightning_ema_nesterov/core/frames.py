"""Which calls are running: for what torch tells nobody, as that an exception ended one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any

__all__ = ["num_running"]


def num_running(code: CodeType, is_own: Callable[[Mapping[str, Any]], bool]) -> int:
    """Return how many calls of a function are running in this thread.

    Args:
        code: That of the function.
        is_own: Tells from the local variables of a call whether it counts.
    """
    count, frame = 0, inspect.currentframe()
    while frame is not None:
        if frame.f_code is code:
            count += is_own(frame.f_locals)
        frame = frame.f_back
    return count
