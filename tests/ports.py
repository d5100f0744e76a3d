"""Ports for process groups that no other test, in this process or beside it, is given."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

# Below those that the system gives to outgoing connections, which could take one at any time.
FIRST, NUM_PORTS = 20_000, 12_000


def free_port() -> int:
    """Return a port that nobody listens on, and that this process does not give out again."""
    for port in _ports:
        with socket.socket() as s:
            try:
                s.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"All {NUM_PORTS} ports from {FIRST} on are in use.")


def _own_ports() -> Iterator[int]:
    """Each worker of pytest-xdist has a quarter; where it starts depends on the process."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    num = NUM_PORTS // 4
    first = FIRST + worker % 4 * num
    start = os.getpid() % num
    yield from (first + (start + idx) % num for idx in range(num))


_ports = _own_ports()
