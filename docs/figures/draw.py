"""Draw the figures of the README and of these pages: python docs/figures/draw.py."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parents[2]
BLUE, ORANGE, GREY, GREEN = "#2a78d6", "#d9822b", "#777777", "#2f9e5b"
ROW = re.compile(
    r"^\| (\w+) \| ([\d,]+) \| ([\d,]+) \| (\d+) to (\d+) \|"
    r".*\| ([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\] \|$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Trajectory:
    """One parameter over a run, all lists by step.

    Attributes:
        iterates: The iterate x, one value more than there are steps.
        lookaheads: The lookahead point y.
        averages: The average a, read out of the direction.
        step_sizes: The current step size.
    """

    iterates: list[float]
    lookaheads: list[float]
    averages: list[float]
    step_sizes: list[float]


def run(
    num_steps: int = 40,
    *,
    step_size: float = 0.7,
    decay: float = 0.8,
    warmup: int = 12,
    rest: int = 6,
) -> Trajectory:
    """Train one parameter on a noisy parabola with its minimum at 1."""
    noise = random.Random(1)
    peak_lr = 0.06
    x, m = 0.0, 0.0
    found = Trajectory([x], [], [], [])
    for step in range(num_steps):
        lr = peak_lr * min(1.0, (num_steps - step) / (0.3 * num_steps))
        is_ahead = warmup <= step < num_steps - rest
        beta = step_size * lr / peak_lr if is_ahead else 0.0
        y = x + beta * m
        previous, x = x, y - lr * (y - 1.0 + noise.gauss(0.0, 0.4))
        m = decay * m + (1.0 - decay) * (x - previous)
        found.iterates.append(x)
        found.lookaheads.append(y)
        found.averages.append(x - decay / (1.0 - decay) * m)
        found.step_sizes.append(beta)
    return found


def draw_run(path: Path) -> None:
    """The iterate, the lookahead point and the average over a run."""
    found = run()
    steps = range(len(found.lookaheads))
    is_ahead = [step for step in steps if found.step_sizes[step] > 0]
    _, (top, bottom) = plt.subplots(
        2, 1, figsize=(7.6, 4.6), sharex=True, height_ratios=[4, 1], layout="constrained"
    )
    for axes in (top, bottom):
        axes.axvspan(is_ahead[0], is_ahead[-1] + 1, color=BLUE, alpha=0.07, lw=0)
    ahead = [found.lookaheads[step] for step in is_ahead]
    behind = [found.iterates[step] for step in is_ahead]
    top.vlines(is_ahead, behind, ahead, color=ORANGE, lw=1.2)
    top.plot(is_ahead, ahead, "o", color=ORANGE, ms=4)
    top.plot(found.iterates, ".-", color=BLUE, lw=1.4, ms=5)
    top.plot([step + 1 for step in steps], found.averages, "--", color=GREEN, lw=1.4)
    top.annotate("lookahead point y", (12.3, 0.93), color=ORANGE)
    top.annotate("iterate x", (3, 0.42), color=BLUE)
    top.annotate("average of the iterates a", (22, 0.62), color=GREEN)
    for text, middle in (("warmup", 6), ("looks ahead", 23), ("rest", 37)):
        top.annotate(text, (middle, -0.02), color=GREY, ha="center")
    top.set_ylabel("one parameter")
    bottom.step([*steps], found.step_sizes, where="post", color=ORANGE)
    bottom.set(xlabel="optimizer step", ylabel="step size", xlim=(0, len(steps)), ylim=(0, 0.85))
    _save(path)


def draw_step(path: Path) -> None:
    """What the parameters hold in one optimizer step."""
    _, axes = plt.subplots(figsize=(7.6, 2.2), layout="constrained")
    rows = [
        (0.0, 2.2, BLUE, "x", "other callbacks\nand hooks"),
        (2.2, 3.6, ORANGE, "y", "training_step, backward\n(all of its micro-batches)"),
        (5.8, 1.6, GREY, "y → x", "optimizer.step"),
        (7.4, 2.6, BLUE, "x", "hooks, validation,\ncheckpoints"),
    ]
    for start, width, color, held, what in rows:
        box = FancyBboxPatch(
            (start + 0.06, 0.0), width - 0.12, 1.0, boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=color, alpha=0.16, edgecolor=color,
        )  # fmt: skip
        axes.add_patch(box)
        middle = start + width / 2
        axes.annotate(what, (middle, 0.5), ha="center", va="center", fontsize=9.5)
        axes.annotate(held, (middle, 1.2), ha="center", color=color, fontsize=12)
    axes.annotate("parameters hold", (0.06, 1.62), color=GREY, fontsize=9.5)
    axes.annotate("", (9.95, -0.25), (0.05, -0.25), arrowprops={"arrowstyle": "->", "color": GREY})
    axes.annotate("time", (9.9, -0.62), ha="right", color=GREY, fontsize=9.5)
    axes.set(xlim=(0, 10), ylim=(-0.75, 1.95))
    axes.axis("off")
    _save(path)


def draw_results(path: Path) -> None:
    """The results of the README, as differences to the baseline with their intervals."""
    rows = ROW.findall((ROOT / "README.md").read_text())
    _, axes = plt.subplots(figsize=(7.6, 3.2), layout="constrained")
    axes.axvline(0.0, color=GREY, lw=1)
    for place, (*_, mean, low, high) in enumerate(rows):
        centre, ends = float(mean), (float(low), float(high))
        color = GREEN if ends[1] < 0 else ORANGE if ends[0] > 0 else GREY
        axes.plot(ends, (place, place), color=color, lw=2, solid_capstyle="round")
        axes.plot(centre, place, "o", color=color, ms=7)
    labels = [
        f"{base}, {tokens} tokens a step, {steps} steps, {int(last) - int(first) + 1} seeds"
        for base, tokens, steps, first, last, *_ in rows
    ]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    _mark_sides(axes)
    axes.set_xticks([-0.04, -0.02, 0.0, 0.02, 0.04])
    axes.set_xlabel("final validation loss with EMA-Nesterov\nminus that without, in nats per byte")
    _save(path)


def draw_gain(path: Path) -> None:
    """How much faster modes settle, and how much noisier they are, over their time scale."""
    lines = (ROOT / "recipes/studies/results/convex_modes.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    figure, both = plt.subplots(1, 2, figsize=(7.6, 3.0), layout="constrained")
    titles = {"speed_up": "times as fast as the base", "noise": "times the base's noise"}
    colors = {"EMA-Nesterov": BLUE, "larger rate": ORANGE, "momentum": GREEN}
    for axes, (key, title) in zip(both, titles.items(), strict=True):
        for method, color in colors.items():
            rows = [(r["time_scale"], r[key]) for r in results if r["method"] == method]
            axes.plot(*zip(*rows, strict=True), "o-", color=color, ms=4, label=method)
        axes.axhline(1.0, color=GREY, lw=1)
        axes.set(xscale="log", ylim=(0, 3.2), title=title)
        axes.set_xticks([0.2, 1, 5, 30], ["0.2", "1", "5", "30"], minor=False)
        axes.set_xlabel("time scale of the mode, in memories of m")
    both[0].set_xlim(both[1].get_xlim())
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    _save(path)


def _mark_sides(axes: Axes) -> None:
    axes.set_xlim(-0.04, 0.04)
    for text, place, side in (("better", -0.0395, "left"), ("worse", 0.0395, "right")):
        axes.annotate(text, (place, -0.75), color=GREY, ha=side, va="center", annotation_clip=False)


def _save(path: Path) -> None:
    for axes in plt.gcf().axes:
        axes.spines[["top", "right"]].set_visible(False)
    plt.savefig(path, metadata={"Date": None})
    plt.close()
    # matplotlib leaves blanks at the ends of lines.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def draw_all(folder: Path) -> list[Path]:
    """Draw all figures into a folder."""
    style: Any = {"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "ema"}
    with mpl.rc_context(style):
        paths = [folder / name for name in ("run.svg", "step.svg", "results.svg", "gain.svg")]
        draws = (draw_run, draw_step, draw_results, draw_gain)
        for path, draw in zip(paths, draws, strict=True):
            draw(path)
    return paths


if __name__ == "__main__":
    draw_all(Path(__file__).parent)
