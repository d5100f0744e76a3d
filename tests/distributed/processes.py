"""Starts ``worker.py`` in several processes, and compares what they computed."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from tests.distributed import cases, worker
from tests.ports import free_port
from tests.processes import environments_of, fork, search_path

# Far below the half hour after which a process group gives up on a process that it waits for.
TIMEOUT_S = 300.0
# What the others get to notice that one has died, before they are ended.
GRACE_S = 20.0

Result = dict[str, Any]


class Results(Mapping[str, Result]):
    """What runs computed, by their names; asking for one that failed says so, and why."""

    def __init__(self, folder: Path, names: Sequence[str], num_processes: int) -> None:
        self.folder = folder
        self.names = list(names)
        self.num_processes = num_processes
        self.failures: dict[str, str] = {}

    def __getitem__(self, name: str) -> Result:
        return self.of_process(name, 0)

    def of_process(self, name: str, rank: int) -> Result:
        """Return what one process has of a run."""
        if name not in self.names:
            raise KeyError(name)
        if name in self.failures:
            raise AssertionError(self.failures[name])
        file = worker.result_file(self.folder, name, rank)
        result: Result = torch.load(file, weights_only=False)
        return result

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def is_complete(self, name: str) -> bool:
        files = [worker.result_file(self.folder, name, r) for r in range(self.num_processes)]
        return all(file.exists() for file in files)

    def explain(self, name: str, codes: Sequence[int | None], output: str) -> None:
        """Note that a run failed, with the traceback of every process that has one."""
        files = [worker.traceback_file(self.folder, name, r) for r in range(self.num_processes)]
        texts = [
            f"Process {rank}: {file.read_text()}"
            for rank, file in enumerate(files)
            if file.exists()
        ]
        self.failures[name] = (
            f"The run {name!r} failed on {self.num_processes} processes, which ended with "
            f"{list(codes)}.\n" + ("\n".join(texts) or f"They wrote:\n{output[-6000:]}")
        )


def launch(folder: Path, num_processes: int, runs: Sequence[cases.Case]) -> Results:
    """Do runs one after another in the same processes; after one that fails, in new ones."""
    names = [run.name for run in runs]
    assert len(set(names)) == len(names), "Two runs have the same name."
    results = Results(Path(tempfile.mkdtemp(dir=folder)), names, num_processes)
    waiting = list(runs)
    while waiting:
        codes, output = wait(start(results.folder, num_processes, waiting), grace_s=GRACE_S)
        complete = [run for run in waiting if results.is_complete(run.name)]
        if not any(codes) and len(complete) == len(waiting):
            break
        failed = next((run for run in waiting if run not in complete), waiting[-1])
        results.explain(failed.name, codes, output)
        waiting = waiting[waiting.index(failed) + 1 :]
    return results


def start(
    folder: Path, num_processes: int, runs: Sequence[cases.Case]
) -> list[tuple[ForkServerProcess, Path]]:
    """Start processes as ``torchrun`` would, without its agent: nobody ends the others for them."""
    environments: list[dict[str, str]] = [{}]
    if not any(isinstance(run.strategy, cases.OneProcess) for run in runs):
        environments = environments_of(num_processes)
    started = []
    for environment in environments:
        log = Path(tempfile.mkstemp(suffix=".log", dir=folder)[1])
        started.append((fork(worker.main, folder, log, environment, runs), log))
    return started


def wait(
    started: Sequence[tuple[ForkServerProcess, Path]], *, grace_s: float = TIMEOUT_S
) -> tuple[list[int | None], str]:
    """Return the exit codes of processes and what they wrote; none may be left waiting.

    Args:
        started: The processes, and their logs.
        grace_s: How long the others may go on when one has failed.
    """
    processes = [process for process, _ in started]
    deadline = time.monotonic() + TIMEOUT_S
    has_failed = False
    while time.monotonic() < deadline:
        # Asked once a round: a process may end between two questions.
        running = [p for p in processes if p.exitcode is None]
        if not running:
            break
        running[0].join(0.05)
        if not has_failed and any(p.exitcode for p in processes):
            has_failed = True
            deadline = min(deadline, time.monotonic() + grace_s)
    for p in processes:
        p.kill()
        p.join()
    output = "\n".join(log.read_text(errors="replace") for _, log in started)
    return [p.exitcode for p in processes], output


def run_nodes(folder: Path, num_nodes: int, runs: Sequence[cases.Case]) -> tuple[list[int], str]:
    """Run ``torchrun`` once for each node, with one process on each; return codes and output."""
    file = folder / "runs.pickle"
    file.write_bytes(pickle.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(num_nodes)]
    command += ["--nproc_per_node", "1", "--rdzv_backend", "c10d", "--local_addr", "127.0.0.1"]
    command += ["--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    command += ["-m", worker.__name__, str(folder), str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path()}
    logs = [folder / f"node-{idx}.log" for idx in range(num_nodes)]
    nodes = []
    for log in logs:
        with log.open("wb") as output:
            nodes.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            )
    deadline = time.monotonic() + TIMEOUT_S
    try:
        codes = [node.wait(max(0.0, deadline - time.monotonic())) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return codes, "\n".join(log.read_text(errors="replace") for log in logs)


def difference(result: Result, expected: Result, prefix: str = "") -> float:
    """Largest relative difference over weights, base state and directions."""
    a, b = result["tensors"], expected["tensors"]
    keys = [key for key in b if key.startswith(prefix)]
    assert keys
    assert set(keys) <= set(a), set(keys) - set(a)  # FSDP1 lists tied weights twice
    # A direction that never moved is zero.
    return max(
        float((a[k].double() - b[k].double()).norm() / b[k].double().norm().clamp(min=1e-30))
        for k in keys
    )
