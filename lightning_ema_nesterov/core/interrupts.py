"""Ctrl-C waits until a move of the parameters is complete."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["uninterrupted"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


class _Held:
    """A handler that notes a first Ctrl-C, and gives a second one to the handler from before."""

    now: _Held | None = None
    """The one that is installed."""

    def __init__(self, before: Any) -> None:
        self.before = before
        self.has_come = False

    def __call__(self, number: int, frame: Any) -> None:
        if self.has_come and callable(self.before):
            self.has_come = False
            self.before(number, frame)
        self.has_come = True


def uninterrupted(move: Callable[_P, _T]) -> Callable[_P, _T]:
    """Hold Ctrl-C back inside of a function, and let it come behind it.

    Python raises it between any two statements: behind a change of the parameters, and before it is
    noted that they changed. Nothing can then be put right. A second Ctrl-C comes at once.
    """

    @functools.wraps(move)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if _Held.now is not None or torch.compiler.is_compiling():
            return move(*args, **kwargs)
        # Other threads get no signal, and a handler of C cannot be put back.
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGINT) if is_main else None
        if before is None:
            return move(*args, **kwargs)
        held = _Held.now = _Held(before)
        signal.signal(signal.SIGINT, held)
        try:
            return move(*args, **kwargs)
        finally:
            signal.signal(signal.SIGINT, before)
            _Held.now = None
            if held.has_come:
                signal.raise_signal(signal.SIGINT)

    return run
