"""What can go wrong in a process, done to it on purpose."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import torch

from tests.distributed import cases
from tests.distributed.strategies import rank, world_size


def commit(kind: cases.FaultKind, *, is_whole_file: bool) -> None:
    """Have the last process die or raise, all be asked to end, or the next save be cut short.

    Args:
        kind: What goes wrong.
        is_whole_file: Whether the first process writes the checkpoint for all of them.
    """
    is_last = rank() == world_size() - 1
    writes = rank() == 0 if is_whole_file else is_last
    if kind == "kill" and is_last:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "raise" and is_last:
        raise ZeroDivisionError("on purpose")
    if kind == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
    if kind in ("kill-in-write", "full-disk") and writes:
        _fail_to_write(is_killed=kind == "kill-in-write")
    if kind == "kill-before-last-file":
        _die_before_last_file()


def _fail_to_write(*, is_killed: bool) -> None:
    """Have a process die in the middle of a write, or find the disk full there.

    The kernel does it: a write past the limit ends the process, as SIGKILL would, or returns an
    error, as that of a full disk does.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if is_killed else signal.SIG_IGN)


def _die_before_last_file() -> None:
    """Have a process die when the shards of a folder are whole and what goes with them is not."""
    save = torch.save

    def save_or_die(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(f, Path) and f.name == "meta.pt":
            os.kill(os.getpid(), signal.SIGKILL)
        save(obj, f, *args, **kwargs)

    vars(torch)["save"] = save_or_die
