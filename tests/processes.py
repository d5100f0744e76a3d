"""Processes that a test starts and waits for."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 240.0


def start_processes(work: Callable[..., None], num_processes: int, *arguments: Any) -> None:
    """Have processes call ``work(rank, num_processes, *arguments)``, and wait until all end.

    They are forked from a server that has imported the module of ``work`` and started nothing: two
    interpreters would import torch and Lightning once more each.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([work.__module__])  # the first that asks for a server is heard
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{rank}.log" for rank in range(num_processes)]
        processes = [
            context.Process(target=_be_one, args=(log, work, rank, num_processes, *arguments))
            for rank, log in enumerate(logs)
        ]
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}):
            for process in processes:
                process.start()
        deadline = time.monotonic() + TIMEOUT_S
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        said = "\n".join(log.read_text(errors="replace")[-4000:] for log in logs if log.exists())
        assert codes == [0] * num_processes, said


def _be_one(log: Path, work: Callable[..., None], rank: int, *arguments: Any) -> None:
    with log.open("wb") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    measure_first_process_only(rank)
    work(rank, *arguments)


def measure_first_process_only(rank: int) -> None:
    """End coverage's trace in the others, which it slows down: they run the same lines."""
    if rank > 0:
        sys.settrace(None)
