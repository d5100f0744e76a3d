"""Ctrl-C waits until a move of the parameters is complete."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["uninterrupted"]


class _Held:
    """A handler that notes a first Ctrl-C, and gives a second one to the handler from before."""

    def __init__(self, before: Any) -> None:
        self.before = before
        self.has_come = False

    def __call__(self, number: int, frame: Any) -> None:
        if self.has_come and callable(self.before):
            self.has_come = False
            self.before(number, frame)
        self.has_come = True


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back inside a ``with`` block or a function, and let it come behind it.

    Python raises it between any two statements: behind a change of the parameters, and before it is
    noted that they changed. Nothing can then be put right. A second Ctrl-C comes at once.
    """
    is_main = threading.current_thread() is threading.main_thread()  # the others get no signal
    before = signal.getsignal(signal.SIGINT) if is_main else None
    if before is None or isinstance(before, _Held) or torch.compiler.is_compiling():
        yield
        return
    held = _Held(before)
    signal.signal(signal.SIGINT, held)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held.has_come:
            signal.raise_signal(signal.SIGINT)
