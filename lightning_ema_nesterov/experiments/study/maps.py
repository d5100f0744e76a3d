"""Figures of a study of learning rate and lookahead step size together."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import AsinhNorm
from matplotlib.patheffects import withStroke

from lightning_ema_nesterov.experiments.study.figures import figure_at
from lightning_ema_nesterov.experiments.study.results import Result
from lightning_ema_nesterov.experiments.study.spec import BASELINE
from lightning_ema_nesterov.experiments.study.tables import CONFIDENCE, Interval, Standing

__all__ = ["draw_step_sizes"]

Cells = Mapping[tuple[float, float], float]
"""Mean final losses by step size and learning rate."""

_NAME = re.compile(r"(.*)\[lookahead_step_size=([^,\]]+)\](?: @ (.*))?")

_IN_WORDS = {
    "map": "Final loss over learning rate and step size",
    "rates": "The same losses as curves",
    "best": "Each step size against the baseline",
}
"""What the figures show, by the end of their names."""


def draw_step_sizes(
    folder: Path, base: str, choosing: Sequence[Result], found: Sequence[Standing]
) -> dict[Path, str]:
    r"""Draw final losses over learning rate and step size, and the best loss of each step size.

    The map is of the runs that choose the learning rate. The line in it goes through the baseline's
    best rate :math:`\eta_0`: where :math:`\eta = (1 - \beta)\,\eta_0`, steady steps are as large.
    A second figure has the same losses as curves, over :math:`\eta` and over
    :math:`\eta / (1 - \beta)`. Where they are one curve on the right, the step size is a larger
    learning rate and no more; where they are one on the left, it does nothing.

    Args:
        folder: Where the PNG files go.
        base: Name of the base optimizer.
        choosing: Results of the seeds that choose the learning rates.
        found: Standings on the base optimizer, of the seeds that are compared.

    Returns:
        The files, and what they show in words: none unless a method has a grid over
        ``lookahead_step_size`` alone, and several learning rates.
    """
    families = dict.fromkeys(match[1] for s in found if (match := _NAME.fullmatch(s.method)))
    of_seeds = _of_seeds(choosing)
    shown = {}
    for family in families:
        cells = _cells(choosing, base, family)
        if min(len({key[axis] for key in cells}) for axis in (0, 1)) < 2:
            continue
        files = {folder / f"{base}_{family}_{kind}.png": text for kind, text in _IN_WORDS.items()}
        of_map, of_rates, of_best = files
        _draw_map(of_map, f"{base}, {family} ({of_seeds})", cells)
        _draw_rates(of_rates, f"{base}, {family} ({of_seeds})", cells)
        _draw_best(of_best, f"{base}, {family}", _by_reading(found, family))
        shown.update(files)
    return shown


def _of_seeds(results: Iterable[Result]) -> str:
    seeds = sorted({result.run.seed for result in results})
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"mean of {len(seeds)} seeds"


def _cells(results: Iterable[Result], base: str, family: str) -> dict[tuple[float, float], float]:
    finals: dict[tuple[float, float], list[float]] = {}
    for result in results:
        step_size = _step_size(result.run.method, family)
        if result.run.base == base and step_size is not None:
            finals.setdefault((step_size, result.run.lr), []).append(result.final)
    return {key: mean(values) for key, values in finals.items()}


def _step_size(method: str, family: str) -> float | None:
    """Return the step size of a method of the family, 0 of the baseline."""
    match = _NAME.fullmatch(method)
    if match and match[1] == family and match[3] is None:
        return float(match[2])
    return 0.0 if method == BASELINE else None


def _draw_map(path: Path, title: str, cells: Cells) -> None:
    step_sizes, lrs = (sorted({key[axis] for key in cells}) for axis in (0, 1))
    losses = np.array([[cells.get((s, lr), math.nan) for lr in lrs] for s in step_sizes])
    of_baseline = {lr: loss for (s, lr), loss in cells.items() if s == 0.0}
    best_lr = min(of_baseline or {lrs[0]: 0.0}, key=lambda lr: of_baseline.get(lr, math.inf))
    reference = of_baseline.get(best_lr, float(np.nanmin(losses)))
    gaps = losses - reference
    bound = _colour_bound(gaps[np.isfinite(gaps)])
    with figure_at(path, height=2.2 + 0.5 * len(step_sizes)) as figure:
        axes = figure.subplots()
        axes.grid(visible=False)
        axes.set_facecolor("lightgrey")  # of what was not tried
        shown = np.where(np.isinf(gaps), math.nan, gaps)
        # Linear near the baseline, where the step size decides, and logarithmic beyond.
        most = float(np.nanmax(np.abs(shown), initial=bound))
        scale = AsinhNorm(linear_width=bound / 3, vmin=-most, vmax=most)
        # Columns of one width: rates that only the baseline had may lie close together.
        image = axes.imshow(shown, cmap="RdBu_r", norm=scale, aspect="auto", origin="lower")
        _write_losses(axes, losses, np.abs(scale(gaps) - 0.5))
        _draw_line(axes, best_lr, step_sizes, lrs)
        axes.set_xticks(range(len(lrs)), [f"{lr:.3g}" for lr in lrs])
        axes.set_yticks(range(len(step_sizes)), [f"{s:g}" for s in step_sizes])
        axes.set_ylabel("lookahead step size β")
        axes.set_xlabel("learning rate η")
        axes.set_title(f"{title}: final loss; bold: the best of each β")
        figure.legend(loc="outside lower center", fontsize="small")
        bar = figure.colorbar(image, label="difference to the baseline's best\n(below 0 is better)")
        ticks = _ticks(bound / 6, most)
        bar.set_ticks(ticks, labels=[f"{tick:+g}" if tick else "0" for tick in ticks], minor=False)
        bar.minorticks_off()


def _ticks(least: float, most: float) -> list[float]:
    """Return 0 and round numbers on both sides of it, of these sizes."""
    known = (float(f"{m}e{power}") for power in range(-9, 9) for m in (1, 2, 5))
    sizes = [value for value in known if least <= value <= most]
    return [*(-value for value in reversed(sizes)), 0.0, *sizes]


def _colour_bound(gaps: np.ndarray) -> float:
    """Return where colours are strong: the middle of all differences, or twice the largest gain."""
    if not gaps.size:
        return 1.0
    return max(-2.0 * float(gaps.min()), float(np.median(np.abs(gaps)))) or 1.0


def _write_losses(axes: Axes, losses: np.ndarray, strengths: np.ndarray) -> None:
    for i, j in np.ndindex(losses.shape):
        loss = losses[i, j]
        if math.isnan(loss):
            continue
        is_dark = math.isfinite(loss) and strengths[i, j] > 0.35
        is_best = loss == np.nanmin(losses[i]) and math.isfinite(loss)
        axes.text(
            j,
            i,
            f"{loss:.4f}" if math.isfinite(loss) else "diverged",
            color="white" if is_dark else "black",
            fontweight="bold" if is_best else "normal",
            ha="center",
            va="center",
            fontsize="small" if losses.shape[1] <= 10 else "xx-small",
            path_effects=[withStroke(linewidth=2.5, foreground="black" if is_dark else "white")],
        )


def _draw_line(
    axes: Axes, best_lr: float, step_sizes: Sequence[float], lrs: Sequence[float]
) -> None:
    # Rows and columns are evenly spaced: between two of them the step size is taken as linear, and
    # the learning rate as geometric. It is drawn to the middle of the outermost columns.
    heights = np.linspace(0, len(step_sizes) - 1, 200)
    betas = np.interp(heights, range(len(step_sizes)), step_sizes)
    rates = best_lr * (1.0 - betas)
    inside = (rates >= lrs[0]) & (rates <= lrs[-1])
    axes.plot(
        np.interp(np.log(rates[inside]), np.log(lrs), range(len(lrs))),
        heights[inside],
        color="black",
        linestyle="--",
        zorder=1.5,  # below the numbers
        path_effects=[withStroke(linewidth=3.5, foreground="white")],
        label="η / (1 - β) = the baseline's best η: steady updates are as large",
    )


def _draw_rates(path: Path, title: str, cells: Cells) -> None:
    step_sizes = sorted({step_size for step_size, _ in cells})
    colours = mpl.colormaps["viridis"](np.linspace(0.0, 0.9, len(step_sizes)))
    with figure_at(path, height=4.6) as figure:
        left, right = figure.subplots(ncols=2, sharey=True)
        for step_size, colour in zip(step_sizes, colours, strict=True):
            of_step_size = ((lr, loss) for (s, lr), loss in cells.items() if s == step_size)
            curve = sorted((lr, loss) for lr, loss in of_step_size if math.isfinite(loss))
            losses = [loss for _, loss in curve]
            style: dict[str, Any] = {"color": colour, "marker": "o", "label": f"{step_size:g}"}
            if step_size == 0.0:
                style |= {"color": "black", "linewidth": 2.0, "zorder": 3}
            left.plot([lr for lr, _ in curve], losses, **style)
            right.plot([lr / (1.0 - step_size) for lr, _ in curve], losses, **style)
        lrs = sorted({lr for s, lr in cells if s != 0.0})  # the baseline's can be too many to read
        gained = _doublings({lr / (1.0 - s) for s, lr in cells}, start=lrs[0])
        for axes, label, rates in (
            (left, "learning rate η", lrs),
            (right, "learning rate of a steady update, η / (1 - β)", gained),
        ):
            axes.set_xscale("log", base=2)
            axes.set_xticks(rates, [f"{rate:.2g}" for rate in rates])
            axes.set_xlabel(label)
        left.set_ylabel("final loss")
        left.legend(title="β", fontsize="small")
        left.set_title("the curves are one if β does nothing", fontsize="medium")
        right.set_title("the curves are one if β is only a larger learning rate", fontsize="medium")
        figure.suptitle(f"{title}: final loss of each step size β")


def _doublings(rates: Collection[float], *, start: float) -> list[float]:
    """Return the rates in a range that are a power of two times the one to start from."""
    first = math.ceil(math.log2(min(rates) / start) - 1e-9)
    last = math.floor(math.log2(max(rates) / start) + 1e-9)
    return [start * 2.0**power for power in range(first, last + 1)]


def _by_reading(found: Sequence[Standing], family: str) -> dict[str, dict[float, Standing]]:
    """Return standings by step size, by the point at which they were evaluated."""
    readings: dict[str, dict[float, Standing]] = {}
    for standing in found:
        match = _NAME.fullmatch(standing.method)
        if match and match[1] == family:
            reading = "iterate" if match[3] is None else f"average, share {match[3]}"
            readings.setdefault(reading, {})[float(match[2])] = standing
    if "iterate" in readings:
        readings["iterate"].setdefault(0.0, found[0])
    return readings


def _draw_best(path: Path, title: str, readings: Mapping[str, Mapping[float, Standing]]) -> None:
    counts = sorted({len(s.results) for rows in readings.values() for s in rows.values()})
    num_seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    with figure_at(path, height=4.6) as figure:
        axes = figure.subplots()
        axes.axhline(0.0, color="black", linewidth=1.0)
        lrs = {s.lr for rows in readings.values() for s in rows.values()}
        betas = sorted({beta for rows in readings.values() for beta in rows})
        for idx, (reading, rows) in enumerate(readings.items()):
            shift = 0.012 * (idx - (len(readings) - 1) / 2)
            # Of the averages only the rates that are not those of the iterate are named.
            named = set(betas) if len(lrs) > 1 else set()
            if reading != "iterate":
                same = readings.get("iterate", {})
                named = {b for b in rows if b in same and rows[b].lr != same[b].lr}
            _draw_reading(axes, reading, rows, betas, shift=shift, named=named)
        axes.legend(fontsize="small")
        axes.margins(0.1)
        axes.set_xlabel("lookahead step size β (0: the baseline)")
        axes.set_ylabel("difference to the baseline\n(below 0 is better)")
        seeds = (
            f"{num_seeds} seeds, intervals of {CONFIDENCE:.0%}"
            if counts[-1] > 1
            else "one seed: no interval"
        )
        rate = "its own best η" if len(lrs) > 1 else f"η {lrs.pop():g}, the best of each"
        axes.set_title(f"{title}: each β at {rate}\n({seeds})")


def _draw_reading(
    axes: Axes,
    reading: str,
    rows: Mapping[float, Standing],
    betas: Sequence[float],
    *,
    shift: float,
    named: Collection[float],
) -> None:
    nowhere = Interval(math.nan, math.nan, math.nan)  # the line is broken where one is missing
    found = [rows[beta].difference if beta in rows else nowhere for beta in betas]
    means = [d.mean if math.isfinite(d.mean) else math.nan for d in found]
    margins = [d.high - d.mean if math.isfinite(d.high) else 0.0 for d in found]
    axes.errorbar(
        [beta + shift for beta in betas], means, margins, marker="o", capsize=3, label=reading
    )
    for beta, value, margin in zip(betas, means, margins, strict=True):
        if beta in rows and beta in named and math.isfinite(value):
            axes.annotate(
                f"η {rows[beta].lr:g}",
                (beta + shift, value + margin),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize="small",
            )
