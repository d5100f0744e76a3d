"""Figures of a study."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from lightning_ema_nesterov.experiments.study.results import Result
from lightning_ema_nesterov.experiments.study.rounds import by_lr
from lightning_ema_nesterov.experiments.study.spec import BASELINE
from lightning_ema_nesterov.experiments.study.tables import Standing, mean_curve

__all__ = [
    "Style",
    "draw_curves",
    "draw_grids",
    "draw_learning_rates",
    "figure_at",
    "styles_of",
]

_COLOURS = [
    *("tab:blue", "tab:red", "tab:green", "tab:purple", "tab:orange", "tab:brown", "tab:pink"),
    *("tab:olive", "tab:cyan"),
]
_LINES = ["-", "--", ":", "-."]

Style = Mapping[str, Any]


@contextmanager
def figure_at(path: Path, *, height: float) -> Iterator[Figure]:
    """Make a figure of the report, and save it when the block ends.

    Args:
        path: PNG file, of 256 colours: a third of the size.
        height: Unit: inches; the width is 9.
    """
    with mpl.rc_context({"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}):
        figure = Figure(figsize=(9.0, height), layout="constrained")
        yield figure
    figure.savefig(path, dpi=110)
    with Image.open(path) as drawn:
        small = drawn.convert("RGB").quantize(256)
    small.save(path, optimize=True)


def styles_of(methods: Sequence[str]) -> dict[str, Style]:
    """Return how each method of a study is drawn, the same in all of its figures.

    Args:
        methods: Names of all methods, in the order of the study.

    Returns:
        Colour and line style of each; the baseline's is black.
    """
    others = [name for name in dict.fromkeys(methods) if name != BASELINE]
    styles: dict[str, Style] = {BASELINE: {"color": "black", "linestyle": "-"}}
    for idx, name in enumerate(others):
        line, colour = divmod(idx, len(_COLOURS))
        styles[name] = {"color": _COLOURS[colour], "linestyle": _LINES[line % len(_LINES)]}
    return styles


def draw_curves(
    path: Path,
    found: Sequence[Standing],
    styles: Mapping[str, Style],
    *,
    title: str,
    shaded: Standing | None = None,
) -> None:
    """Draw validation loss over steps, and its difference to the baseline, at the best rates.

    Args:
        path: PNG file.
        found: Standings on one base optimizer, the baseline first.
        styles: As :func:`styles_of` gives them.
        title: Title of the picture.
        shaded: The method whose steps that look ahead are shaded; by default that of a comparison
            of one method alone.
    """
    curves = {s.method: mean_curve(s.results.values()) for s in found}
    reference = {step: loss for step, loss, _ in curves[found[0].method]}
    with figure_at(path, height=7.0) as figure:
        losses, gaps = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        late: list[float] = []
        for standing in found:
            if not curves[standing.method]:
                continue  # each of its runs diverged
            columns = zip(*curves[standing.method], strict=True)
            steps, means, spread = (np.array(column) for column in columns)
            style = styles[standing.method]
            label = f"{standing.method}, lr {standing.lr:g}, ends at {means[-1]:.4f}"
            losses.plot(steps, means, **style, label=label)
            losses.fill_between(
                steps, means - spread, means + spread, color=style["color"], alpha=0.12
            )
            gap = means - np.array([reference.get(step, math.nan) for step in steps.tolist()])
            gaps.plot(steps, gap, **style, marker=".")
            late += gap[len(gap) // 3 :].tolist()
        values = [loss for curve in curves.values() for _, loss, _ in curve]
        has_seeds = any(len(standing.results) > 1 for standing in found)
        _frame(losses, gaps, values, reference, late, has_seeds=has_seeds)
        losses.set_title(title)
        shaded = found[1] if shaded is None and len(found) == 2 else shaded
        if shaded is not None:
            _shade((losses, gaps), shaded)


def _frame(
    losses: Axes,
    gaps: Axes,
    values: Sequence[float],
    reference: Mapping[int, float],
    late: Sequence[float],
    *,
    has_seeds: bool,
) -> None:
    """Label the axes, and show what is close to the baseline rather than the start."""
    if reference:
        top = list(reference.values())[len(reference) // 5]
        losses.set_ylim(min(values) - 0.03, top + 0.05)
        margin = min(1.15 * max(map(abs, late), default=0.0) + 1e-3, 0.15)
        gaps.set_ylim(-margin, margin)
    if values:
        losses.legend(fontsize="small")
    losses.set_ylabel(f"validation loss{', mean ± sd of seeds' * has_seeds}")
    gaps.set_ylabel("difference to the baseline\n(below 0 is better)")
    gaps.set_xlabel("optimizer steps")


def _shade(both: Sequence[Axes], standing: Standing) -> None:
    ranges = [r.lookahead_steps for r in standing.results.values() if r.lookahead_steps]
    if not ranges:
        return
    for axes in both:
        axes.axvspan(
            min(first for first, _ in ranges),
            max(last for _, last in ranges),
            color="tab:blue",
            alpha=0.07,
            linewidth=0,
        )
    both[-1].annotate(
        f"shaded: {standing.method} looks ahead",
        (0.01, 0.05),
        xycoords="axes fraction",
        fontsize="small",
    )


def draw_learning_rates(
    path: Path, base: str, choosing: Sequence[Result], styles: Mapping[str, Style]
) -> None:
    """Draw the final loss over the learning rates, mean and standard deviation over seeds.

    Args:
        path: PNG file.
        base: Name of the base optimizer.
        choosing: Results that the learning rates were chosen on.
        styles: As :func:`styles_of` gives them, in the order of the legend.
    """
    with figure_at(path, height=4.2) as figure:
        axes = figure.subplots()
        for method, style in styles.items():
            rows = [
                (lr, [r.final for r in seeds.values()])
                for lr, seeds in by_lr(choosing, base, method).items()
            ]
            rows = [(lr, finals) for lr, finals in rows if all(map(math.isfinite, finals))]
            if not rows:
                continue
            axes.errorbar(
                [lr for lr, _ in rows],
                [mean(finals) for _, finals in rows],
                [stdev(finals) if len(finals) > 1 else 0.0 for _, finals in rows],
                **style,
                marker="o",
                capsize=3,
                label=method,
            )
            axes.legend(fontsize="small")
        axes.set_xscale("log", base=2)
        ticks = sorted({r.run.lr for r in choosing if r.run.base == base})
        axes.set_xticks(ticks, [f"{lr:g}" for lr in ticks])
        axes.set_xlabel("learning rate")
        axes.set_ylabel("final validation loss")
        seeds = sorted({r.run.seed for r in choosing})
        named = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        axes.set_title(f"{base}: final loss over the learning rate, {named}")


def draw_grids(folder: Path, base: str, found: Sequence[Standing]) -> list[Path]:
    """Draw the differences to the baseline over two arguments of a method, as maps of colours.

    Args:
        folder: Where the PNG files go.
        base: Name of the base optimizer.
        found: Its standings.

    Returns:
        A file for each method with two arguments in a grid.
    """
    grids: dict[str, _Grid] = {}
    for standing in found:
        match = re.fullmatch(r"(.*)\[(\w+)=([^,]+),(\w+)=([^,]+)\]", standing.method)
        if match:
            method, row, row_value, column, column_value = match.groups()
            grid = grids.setdefault(method, _Grid(f"{base}, {method}", row, column))
            grid.cells[row_value, column_value] = standing.difference.mean
    paths = {folder / f"{base}_{method}_grid.png": grid for method, grid in grids.items()}
    for path, grid in paths.items():
        _draw_grid(path, grid)
    return list(paths)


@dataclass
class _Grid:
    title: str
    row: str
    column: str
    cells: dict[tuple[str, str], float] = field(default_factory=dict)


def _draw_grid(path: Path, grid: _Grid) -> None:
    rows, columns = (_in_order([key[idx] for key in grid.cells]) for idx in (0, 1))
    values = np.array([[grid.cells.get((r, c), math.nan) for c in columns] for r in rows])
    bound = _colour_bound(values[np.isfinite(values)])
    with figure_at(path, height=1.6 + 0.6 * len(rows)) as figure:
        axes = figure.subplots()
        image = axes.imshow(values, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
        axes.grid(visible=False)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_ylabel(grid.row)
        axes.set_xlabel(grid.column)
        axes.set_title(f"{grid.title}: difference to the baseline (below 0, blue, is better)")
        for i, j in np.ndindex(values.shape):
            value = values[i, j]
            text = "" if math.isnan(value) else f"{value:+.3f}" if value < math.inf else "diverged"
            colour = "white" if 0.7 * bound < abs(value) < math.inf else "black"
            axes.text(j, i, text, color=colour, ha="center", va="center", fontsize="small")
        figure.colorbar(image, extend="both")


def _in_order(labels: Sequence[str]) -> list[str]:
    """Return different labels, by their value where they are numbers."""
    unique = list(dict.fromkeys(labels))
    try:
        return sorted(unique, key=float)
    except ValueError:
        return unique


def _colour_bound(values: np.ndarray) -> float:
    """Return twice the largest gain, so that it shows beside large losses."""
    if not values.size:
        return 1.0
    gain = -float(values.min())
    return 2.0 * gain if gain > 0 else float(np.abs(values).max()) or 1.0
