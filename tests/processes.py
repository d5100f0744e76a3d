"""Processes that a test starts and waits for."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from io import TextIOWrapper
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch

from tests.ports import free_port

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 240.0
# The first who starts the server decides what it imports: the same for all.
PRELOADED = ["tests.distributed.worker", "tests.litgpt.runs"]


def fork(work: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """Start a process that is forked from a server, which has imported much and started nothing.

    An interpreter of its own would import torch and Lightning once more.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=work, args=arguments)
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONPATH": search_path()}):
        process.start()
    return process


def search_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def start_processes(work: Callable[..., None], num_processes: int, *arguments: Any) -> None:
    """Have processes call ``work(rank, num_processes, *arguments)``, and wait until all end."""
    with TemporaryDirectory() as folder:
        processes = [
            Forked(_be_one, work, rank, num_processes, *arguments, log=Path(folder) / f"{rank}.log")
            for rank in range(num_processes)
        ]
        try:
            for process in processes:
                process.finish()
        finally:
            for process in processes:
                process.kill()


class Forked:
    """A process from :func:`fork` with a log.

    Args:
        work: What it calls.
        arguments: Of ``work``.
        log: Where it writes what it prints.
    """

    def __init__(self, work: Callable[..., None], *arguments: Any, log: Path) -> None:
        self.log = log
        log.touch()
        self.process = fork(_with_log, log, work, *arguments)

    def output(self) -> str:
        """Return what was printed until now."""
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        """Wait until something is printed."""
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self.output():
            assert self.process.is_alive(), self.output()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def finish(self) -> str:
        """Wait for a good end, and return what was printed."""
        try:
            self.process.join(TIMEOUT_S)
            code = self.process.exitcode
        finally:
            self.kill()
        assert code == 0, self.output()[-4000:]
        return self.output()

    def kill(self) -> None:
        """End it, if it has not ended, as SIGKILL does."""
        self.process.kill()
        self.process.join()


def _with_log(log: Path, work: Callable[..., None], *arguments: Any) -> None:
    with log.open("wb") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    work(*arguments)


def _be_one(work: Callable[..., None], rank: int, *arguments: Any) -> None:
    measure_first_process_only(rank)
    work(rank, *arguments)


def measure_first_process_only(rank: int) -> None:
    """End coverage's trace in the others, which it slows down: they run the same lines."""
    if rank > 0:
        sys.settrace(None)


def environments_of(num_processes: int) -> list[dict[str, str]]:
    """Return those of all processes, with a port of their own."""
    port = free_port()
    return [environment_of(rank, num_processes, port) for rank in range(num_processes)]


def environment_of(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """Return the variables that ``torchrun`` sets, on one node."""
    return {
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
