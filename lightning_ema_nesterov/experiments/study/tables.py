"""Every method at its own best learning rate, against the baseline at its best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import NamedTuple

from lightning_ema_nesterov.experiments.study.results import Result
from lightning_ema_nesterov.experiments.study.rounds import by_lr, with_most_seeds
from lightning_ema_nesterov.experiments.study.spec import BASELINE

__all__ = [
    "CONFIDENCE",
    "Interval",
    "Standing",
    "markdown_table",
    "mean_curve",
    "notes_on",
    "paired_difference",
    "standings",
]

CONFIDENCE = 0.95
"""Confidence of the intervals of paired differences."""

HEAD = (
    "method",
    "learning rate",
    "final loss",
    "difference to the baseline",
    "baseline at lr / (1 - β)",
    "steps to the baseline's final loss",
    "seconds to it",
    "extra state",
    "step time",
)


class Interval(NamedTuple):
    """A mean and its confidence interval; the ends are infinite for a single value."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Standing:
    """A method at the learning rate at which its mean final loss is smallest.

    Attributes:
        method: Its name.
        lr: That learning rate.
        edge: ``"smallest"`` or ``"largest"`` where it is at an end of those that were compared, so
            that a better one may lie beyond; else empty, also where there is only one.
        results: Its runs there, by seed.
        difference: Final loss minus that of the baseline at its best, paired by seed.
        gained: The baseline's final losses at ``lr / (1 - step size)``; empty where it has none.
        gained_lr: That learning rate.
        steps_to_target: Steps after which the mean loss was first as low as the mean final loss of
            the baseline with these seeds; ``None`` if never.
        extra_state: Elements per parameter that the baseline's optimizer does not keep.
        step_time: Time of a step over that of the baseline.
    """

    method: str
    lr: float
    edge: str
    results: dict[int, Result]
    difference: Interval
    gained: list[float]
    gained_lr: float
    steps_to_target: int | None
    extra_state: float
    step_time: float

    @property
    def finals(self) -> list[float]:
        """Final loss of each seed."""
        return [result.final for result in self.results.values()]

    @property
    def step_seconds(self) -> float:
        """Median step time, averaged over seeds."""
        return mean(result.step_seconds for result in self.results.values())


def standings(
    results: Sequence[Result],
    base: str,
    methods: Sequence[str] = (),
    choosing: Sequence[Result] = (),
) -> list[Standing]:
    """Compare all methods on one base optimizer; the baseline comes first.

    Of the learning rates of a method those with the most seeds are compared.

    Args:
        results: Results of a study.
        base: Name of the base optimizer.
        methods: Names of methods in the order of the others; those that are missing come last.
        choosing: Results that the learning rates were chosen on, if these are others.

    Raises:
        ValueError: If the baseline has no runs.
    """
    baseline = with_most_seeds(by_lr(results, base, BASELINE))
    if not baseline:
        raise ValueError(f"{base} must have runs of the baseline, and has none that are finished.")
    best = baseline[_best_lr(baseline)]
    trained = [r.run.method for r in results if r.run.base == base]
    found = []
    for method in dict.fromkeys([BASELINE, *methods, *trained]):
        rows = with_most_seeds(by_lr(results, base, method))
        tried = with_most_seeds(by_lr(choosing or results, base, method))
        if rows:
            found.append(_standing(method, rows, baseline, best, sorted(tried)))
    return found


def _standing(
    method: str,
    rows: Mapping[float, dict[int, Result]],
    baseline: Mapping[float, dict[int, Result]],
    best: dict[int, Result],
    tried: Sequence[float],
) -> Standing:
    lr = _best_lr(rows)
    chosen = rows[lr]
    shared = {seed: best[seed] for seed in chosen if seed in best} or best
    step_size = max(result.step_size for result in chosen.values())
    gained_lr = float(f"{lr / (1.0 - round(step_size, 6)):.3g}")
    has_gain = method != BASELINE and step_size > 0 and gained_lr in baseline
    target = mean(result.final for result in shared.values())
    reached = (step for step, loss, _ in mean_curve(chosen.values()) if loss <= target)
    return Standing(
        method=method,
        lr=lr,
        edge=_edge(lr, tried),
        results=chosen,
        difference=paired_difference(chosen, best),
        gained=[r.final for r in baseline[gained_lr].values()] if has_gain else [],
        gained_lr=gained_lr,
        steps_to_target=next(reached, None),
        extra_state=_mean(chosen, "state_per_parameter") - _mean(shared, "state_per_parameter"),
        step_time=_mean(chosen, "step_seconds") / _mean(shared, "step_seconds"),
    )


def _best_lr(rows: Mapping[float, dict[int, Result]]) -> float:
    return min(rows, key=lambda lr: mean(result.final for result in rows[lr].values()))


def _edge(lr: float, lrs: Sequence[float]) -> str:
    if len(lrs) < 2 or lr not in (lrs[0], lrs[-1]):
        return ""
    return "smallest" if lr == lrs[0] else "largest"


def _mean(results: Mapping[int, Result], name: str) -> float:
    return mean(float(getattr(result, name)) for result in results.values())


def paired_difference(results: Mapping[int, Result], baseline: Mapping[int, Result]) -> Interval:
    """Return the mean difference of final losses over the seeds that both have.

    The interval is Student's, for :data:`CONFIDENCE`.
    """
    seeds = [seed for seed in results if seed in baseline]
    gaps = [results[seed].final - baseline[seed].final for seed in seeds]
    if not gaps or not all(map(math.isfinite, gaps)):
        return Interval(math.inf, math.inf, math.inf)
    centre = mean(gaps)
    if len(gaps) == 1:
        return Interval(centre, -math.inf, math.inf)
    from scipy import stats  # the quickstart, with its one seed, does without

    quantile = float(stats.t.ppf((1.0 + CONFIDENCE) / 2.0, len(gaps) - 1))
    margin = quantile * stdev(gaps) / math.sqrt(len(gaps))
    return Interval(centre, centre - margin, centre + margin)


def mean_curve(results: Iterable[Result]) -> list[tuple[int, float, float]]:
    """Return steps, the mean validation loss over runs, and its standard deviation there.

    Args:
        results: Runs with the same validation steps; those that diverged are left out.
    """
    runs = [result for result in results if not result.is_diverged]
    curve = []
    for points in zip(*(run.val_loss for run in runs), strict=True):
        losses = [point.value for point in points]
        spread = stdev(losses) if len(losses) > 1 else 0.0
        curve.append((points[0].step, mean(losses), spread))
    return curve


def markdown_table(found: Sequence[Standing]) -> str:
    """Return the standings of one base optimizer as a Markdown table, without empty columns."""
    columns = [(c[0], "---", *c[1:]) for c in zip(HEAD, *map(_cells, found), strict=True)]
    shown = [column for column in columns if any(column[2:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*shown, strict=True))


def notes_on(choosing: Sequence[Result], base: str, methods: Sequence[str] = ()) -> list[str]:
    """Return what a reader of the table of one base optimizer must know about learning rates.

    Args:
        choosing: Results that the learning rates were chosen on.
        base: Name of the base optimizer.
        methods: As for :func:`standings`.
    """
    found = standings(choosing, base, methods)
    tried = {s.method: by_lr(choosing, base, s.method) for s in found}
    of_others = {lr for method, rows in tried.items() if method != BASELINE for lr in rows}
    alone = [f"{lr:g}" for lr in tried[BASELINE] if of_others and lr not in of_others]
    without = [s.method for s in found[1:] if found[0].lr not in tried[s.method]]
    partial = [
        f"{method} at {lr:g}"
        for method, rows in tried.items()
        for lr in sorted(rows.keys() - with_most_seeds(rows).keys())
    ]
    lines = {
        "Learning rates that only the baseline had": alone,
        f"Not tried at {found[0].lr:g}, the baseline's best learning rate": without,
        "Not compared, for lack of seeds": partial,
    }
    return [f"{text}: {', '.join(names)}." for text, names in lines.items() if names]


def _cells(standing: Standing) -> list[str]:
    difference = standing.difference
    is_baseline = standing.method == BASELINE
    interval = f"{difference.mean:+.4f}"
    if math.isfinite(difference.low):
        interval += f" [{difference.low:+.4f}, {difference.high:+.4f}]"
    steps = standing.steps_to_target
    return [
        standing.method,
        f"{standing.lr:g}" + f" ({standing.edge})" * bool(standing.edge),
        _spread(standing.finals),
        "" if is_baseline else interval if math.isfinite(difference.mean) else "diverged",
        f"{_spread(standing.gained)} at {standing.gained_lr:g}" if standing.gained else "",
        "never" if steps is None else f"{steps:,}",
        "" if steps is None else f"{steps * standing.step_seconds:.1f}",
        f"{standing.extra_state:+.2f}",
        f"{standing.step_time:.2f}",
    ]


def _spread(values: Sequence[float]) -> str:
    if not all(map(math.isfinite, values)):
        return "diverged"
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{mean(values):.4f} ± {stdev(values):.4f}"
