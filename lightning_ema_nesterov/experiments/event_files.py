"""Scalars from TensorBoard event files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

__all__ = ["Point", "read_scalar", "read_scalars"]


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


def read_scalar(log_dir: Path, tag: str) -> list[Point]:
    """Read one scalar from the event files of a run.

    Args:
        log_dir: Folder with the event files.
        tag: For example ``val_loss``.

    Raises:
        FileNotFoundError: If the folder holds no value of that tag.
    """
    scalars = read_scalars(log_dir)
    if tag not in scalars:
        raise FileNotFoundError(f"{log_dir} must hold event files with the scalar {tag!r}.")
    return scalars[tag]
