"""Starts a loop of this folder in two processes, and returns what the first one wrote."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
NUM_PROCESSES = 2
TIMEOUT_S = 240.0


def run(module: str, folder: Path, *args: str) -> dict[str, Any]:
    """Run ``main(folder, *args)`` of a module in two processes; raise with what they wrote.

    Args:
        module: Name of the module in this folder.
        folder: Where it writes; ``result.pt`` is returned.
        args: What the module takes.
    """
    folder.mkdir(exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(NUM_PROCESSES),
        "LOCAL_WORLD_SIZE": str(NUM_PROCESSES),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", f"tests.other_trainers.{module}", str(folder), *args]
    logs = [folder / f"log-{rank}" for rank in range(NUM_PROCESSES)]
    started = []
    for rank, log in enumerate(logs):
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        started.append(process)
    try:
        codes = [process.wait(TIMEOUT_S) for process in started]
    finally:
        for process in started:
            process.kill()
    written = "\n".join(log.read_text(errors="replace")[-4000:] for log in logs)
    assert codes == [0] * NUM_PROCESSES, written
    result: dict[str, Any] = torch.load(folder / "result.pt", weights_only=False)
    return result
