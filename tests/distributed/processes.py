"""Starts ``worker.py`` in several processes, and compares what they computed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WORKER = Path(__file__).parent / "worker.py"
# Far below the half hour after which a process group gives up on a process that it waits for.
TIMEOUT_S = 300.0

Result = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The processes of one run, and the files that they write to."""

    processes: list[subprocess.Popen[bytes]]
    logs: list[Path]

    def wait(self) -> tuple[list[int], str]:
        """Return their exit codes and what they wrote; none may be left waiting."""
        deadline = time.monotonic() + TIMEOUT_S
        try:
            codes = [p.wait(max(0.0, deadline - time.monotonic())) for p in self.processes]
        finally:
            for p in self.processes:
                p.kill()
        return codes, "\n".join(log.read_text(errors="replace") for log in self.logs)


def start(folder: Path, num_processes: int, configs: list[dict[str, Any]]) -> Run:
    """Start processes as ``torchrun`` would, without its agent: nobody ends the others for them."""
    environments: list[dict[str, str]] = [{}]
    if "one" not in {config.get("strategy") for config in configs}:
        common = {
            "TORCHELASTIC_RUN_ID": "test",
            "WORLD_SIZE": str(num_processes),
            "LOCAL_WORLD_SIZE": str(num_processes),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        ranks = [str(rank) for rank in range(num_processes)]
        environments = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in ranks]
    return _popen(folder, configs, [([], environment) for environment in environments])


def start_nodes(folder: Path, num_nodes: int, configs: list[dict[str, Any]]) -> Run:
    """Start ``torchrun`` once for each node, with one process on each."""
    command = ["-m", "torch.distributed.run", "--nnodes", str(num_nodes), "--nproc_per_node", "1"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    command += ["--local_addr", "127.0.0.1"]
    return _popen(folder, configs, [(command, {})] * num_nodes)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _popen(
    folder: Path, configs: list[dict[str, Any]], launches: list[tuple[list[str], dict[str, str]]]
) -> Run:
    tag = f"{configs[0]['name']}-{len(launches)}"
    file = folder / f"{tag}.json"
    file.write_text(json.dumps(configs))
    path = os.pathsep.join([str(WORKER.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = Run([], [folder / f"{tag}-{idx}.log" for idx in range(len(launches))])
    for (command, environment), log in zip(launches, run.logs, strict=True):
        with log.open("wb") as output:
            run.processes.append(
                subprocess.Popen(
                    [sys.executable, *command, str(WORKER), str(folder), file.name],
                    env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    return run


def results_of(run: Run, folder: Path, configs: list[dict[str, Any]]) -> dict[str, Result]:
    """Wait for a run, and return what it computed, by the name of the configuration."""
    codes, output = run.wait()
    assert not any(codes), output[-8000:]
    return {c["name"]: torch.load(folder / f"{c['name']}.pt", weights_only=False) for c in configs}


def launch(folder: Path, num_processes: int, configs: list[dict[str, Any]]) -> dict[str, Result]:
    """Run configurations one after another in the same processes."""
    return results_of(start(folder, num_processes, configs), folder, configs)


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
