"""Final loss against the memory of the optimizer, over all base optimizers of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from lightning_ema_nesterov.experiments.study.figures import figure_at
from lightning_ema_nesterov.experiments.study.tables import Standing

__all__ = ["MemoryPoint", "draw_frontier", "frontier", "memory_points", "memory_table"]


@dataclass(frozen=True)
class MemoryPoint:
    """One method on one base optimizer, at its best learning rate.

    Attributes:
        base: Name of the base optimizer.
        method: Name of the method.
        kib: What the optimizer keeps. Unit: KiB.
        losses: Final loss of each seed.
    """

    base: str
    method: str
    kib: float
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Mean final loss."""
        return mean(self.losses)


def memory_points(found: Mapping[str, Sequence[Standing]]) -> list[MemoryPoint]:
    """Return what did not diverge and whose memory is known, the smallest first.

    Of a grid on one base optimizer it is the lowest of those that keep as much.

    Args:
        found: Standings by base optimizer.
    """
    lowest: dict[tuple[str, str, float], MemoryPoint] = {}
    for base, standings in found.items():
        for s in standings:
            kept = [r.state_bytes for r in s.results.values() if r.state_bytes is not None]
            if len(kept) < len(s.results) or not all(map(math.isfinite, s.finals)):
                continue
            point = MemoryPoint(base, s.method, max(kept) / 1024, tuple(s.finals))
            alike = (base, s.method.partition("[")[0], point.kib)
            if alike not in lowest or point.loss < lowest[alike].loss:
                lowest[alike] = point
    return sorted(lowest.values(), key=lambda point: (point.kib, point.loss))


def frontier(points: Sequence[MemoryPoint]) -> list[MemoryPoint]:
    """Return the points below which no other keeps as little and ends as low.

    Args:
        points: As :func:`memory_points` orders them.
    """
    best: list[MemoryPoint] = []
    for point in points:
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def draw_frontier(path: Path, points: Sequence[MemoryPoint]) -> None:
    """Draw final loss over the memory of the optimizer, and the frontier.

    Args:
        path: PNG file.
        points: As :func:`memory_points` orders them.
    """
    on_it = frontier(points)
    with figure_at(path, height=6.0) as figure:
        axes = figure.subplots()
        axes.step([p.kib for p in on_it], [p.loss for p in on_it], "k--", where="post", lw=0.8)
        for method in dict.fromkeys(point.method for point in points):
            own = [point for point in points if point.method == method]
            spread = [stdev(p.losses) if len(p.losses) > 1 else 0.0 for p in own]
            kib, losses = [p.kib for p in own], [p.loss for p in own]
            axes.errorbar(kib, losses, spread, fmt="o", capsize=2, label=method)
        for point in points:
            axes.annotate(
                point.base,
                (point.kib, point.loss),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize="small",
            )
        axes.set_xlabel("optimizer state, KiB")
        axes.set_ylabel("final validation loss")
        axes.set_title("Loss over optimizer memory; dashed: nothing smaller ends as low")
        axes.legend()


def memory_table(points: Sequence[MemoryPoint]) -> str:
    """Return the points as a Markdown table; those on the frontier are bold."""
    on_it = frontier(points)
    rows = ["| base | method | optimizer state, KiB | final loss |", "|---|---|---|---|"]
    for point in points:
        spread = f" ± {stdev(point.losses):.4f}" if len(point.losses) > 1 else ""
        mark = "**" if point in on_it else ""
        rows.append(
            f"| {mark}{point.base}{mark} | {point.method} | {point.kib:,.0f} | "
            f"{point.loss:.4f}{spread} |"
        )
    return "\n".join(rows)
