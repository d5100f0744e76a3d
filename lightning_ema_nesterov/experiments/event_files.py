"""Scalars from TensorBoard event files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

__all__ = ["Point", "read_scalars"]


class Point(NamedTuple):
    """One logged value.

    Attributes:
        step: Optimizer steps taken when it was logged.
        seconds: Wall-clock time since the run's first logged value.
        value: The value.
    """

    step: int
    seconds: float
    value: float


def read_scalars(log_dir: Path) -> dict[str, list[Point]]:
    """Read all scalars from the event files of a run.

    Args:
        log_dir: Folder with the event files.

    Returns:
        The logged values of each tag, in their order.
    """
    accumulator = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    started = accumulator.FirstEventTimestamp() if tags else 0.0
    # Lightning writes the index of the step that was taken last.
    return {
        tag: [Point(e.step + 1, e.wall_time - started, e.value) for e in accumulator.Scalars(tag)]
        for tag in tags
    }
