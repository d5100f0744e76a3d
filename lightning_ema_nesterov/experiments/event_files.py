"""TensorBoard event files in, tables and figures out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

__all__ = [
    "Comparison",
    "Point",
    "compare",
    "draw_curves",
    "format_table",
    "read_scalar",
    "read_scalars",
]


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


@dataclass(frozen=True)
class Comparison:
    """Two runs by their validation loss.

    Attributes:
        baseline_final: Last validation loss of the baseline. Unit: nats per byte.
        baseline_best: Smallest one.
        final: Last validation loss of the other run.
        best: Smallest one.
        baseline_steps: Optimizer steps of the baseline up to its last validation.
        baseline_seconds: Seconds up to there, validation included.
        steps_to_baseline_final: Optimizer steps at which the other run was first as good as the
            baseline's last validation loss; ``None`` if never.
        seconds_to_baseline_final: Seconds at that point, validation included.
    """

    baseline_final: float
    baseline_best: float
    final: float
    best: float
    baseline_steps: int
    baseline_seconds: float
    steps_to_baseline_final: int | None
    seconds_to_baseline_final: float | None


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


def compare(baseline: Sequence[Point], other: Sequence[Point]) -> Comparison:
    """Compare two runs by their validation loss.

    Args:
        baseline: Validation losses of the baseline, at least one.
        other: Validation losses of the other run, at least one.
    """
    target = baseline[-1].value
    reached = next((point for point in other if point.value <= target), None)
    return Comparison(
        baseline_final=target,
        baseline_best=min(point.value for point in baseline),
        final=other[-1].value,
        best=min(point.value for point in other),
        baseline_steps=baseline[-1].step,
        baseline_seconds=baseline[-1].seconds,
        steps_to_baseline_final=reached.step if reached else None,
        seconds_to_baseline_final=reached.seconds if reached else None,
    )


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Align rows of cells in columns; the first row is the head, numbers are set flush right.

    Example:
        >>> print(format_table([["run", "loss"], ["adamw", "1.5"]]))
        run    loss
        -----  ----
        adamw   1.5
    """
    widths = [max(len(row[idx]) for row in rows) for idx in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if idx else cell.ljust(width)
            for idx, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join(
        [line(rows[0]), "  ".join("-" * width for width in widths), *map(line, rows[1:])]
    )


def draw_curves(
    path: Path,
    baseline: Sequence[Point],
    other: Sequence[Point],
    *,
    labels: tuple[str, str],
    lookahead: Sequence[Point],
    title: str,
) -> None:
    """Draw two validation curves and their difference into a PNG file.

    Args:
        path: Where the picture goes.
        baseline: Validation losses of the baseline.
        other: Validation losses of the other run, at the same steps.
        labels: Names of the two runs.
        lookahead: Current step size over time; where it is above 0, the background is shaded.
        title: Title of the picture.
    """
    with mpl.rc_context({"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}):
        figure = Figure(figsize=(8.0, 6.4), layout="constrained")
        losses, difference = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    curves = zip(("tab:gray", "tab:blue"), labels, (baseline, other), strict=True)
    for colour, label, points in curves:
        final = points[-1].value
        losses.plot(
            [p.step for p in points],
            [p.value for p in points],
            color=colour,
            marker=".",
            label=f"{label}, ends at {final:.4f}",
        )
    losses.axhline(baseline[-1].value, color="tab:gray", linestyle=":", linewidth=1)
    losses.set_ylabel("validation loss (nats per byte)")
    lowest = min(point.value for point in (*baseline, *other))
    median = sorted(point.value for point in baseline)[len(baseline) // 2]
    losses.set_ylim(lowest - 0.03, max(median + 4 * (median - lowest), lowest + 0.1))
    losses.set_title(title)
    losses.legend()

    gaps = [o.value - b.value for b, o in zip(baseline, other, strict=True)]
    difference.plot([p.step for p in other], gaps, color="tab:blue", marker=".")
    difference.axhline(0.0, color="tab:gray", linewidth=1)
    difference.set_ylabel("difference to baseline\n(below 0 is better)")
    difference.set_xlabel("optimizer steps")
    late = gaps[len(gaps) // 5 :]
    margin = 1.2 * max(abs(gap) for gap in late) + 1e-3
    difference.set_ylim(-margin, margin)
    active = [point.step for point in lookahead if point.value > 0]
    if active:
        for axes in (losses, difference):
            axes.axvspan(min(active), max(active), color="tab:blue", alpha=0.07, linewidth=0)
        difference.annotate(
            "shaded: looking ahead", (0.01, 0.05), xycoords="axes fraction", fontsize="small"
        )
    figure.savefig(path, dpi=130)
