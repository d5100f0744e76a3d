"""Two rounds of a study: seeds that choose learning rates, and seeds that confirm them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from lightning_ema_nesterov.experiments.study.results import Result, method_of, with_averages
from lightning_ema_nesterov.experiments.study.spec import BASELINE, Run, Study

__all__ = ["best_lrs", "by_lr", "confirming_runs", "judged", "with_most_seeds"]


def by_lr(results: Sequence[Result], base: str, method: str) -> dict[float, dict[int, Result]]:
    """Return the results of one method on one base optimizer, by learning rate and seed."""
    chosen = [r for r in results if (r.run.base, r.run.method) == (base, method)]
    lrs = sorted({r.run.lr for r in chosen})
    return {lr: {r.run.seed: r for r in chosen if r.run.lr == lr} for lr in lrs}


def with_most_seeds(rows: Mapping[float, dict[int, Result]]) -> dict[float, dict[int, Result]]:
    """Return the learning rates that have the most seeds, of results as :func:`by_lr` has them."""
    most = max((len(seeds) for seeds in rows.values()), default=0)
    return {lr: seeds for lr, seeds in rows.items() if len(seeds) == most}


def best_lrs(results: Sequence[Result], base: str, margin: float = 0.0) -> dict[str, list[float]]:
    """Return the learning rate of the smallest mean final loss of each method, and close ones.

    Args:
        results: Results of a study.
        base: Name of the base optimizer.
        margin: How far above that loss a rate is close. These follow the best one, lowest first.
    """
    found = {}
    for method in dict.fromkeys(r.run.method for r in results if r.run.base == base):
        rows = with_most_seeds(by_lr(results, base, method))
        losses = {lr: mean(r.final for r in seeds.values()) for lr, seeds in rows.items()}
        best, *others = sorted(losses, key=losses.__getitem__)
        found[method] = [best, *(lr for lr in others if losses[lr] - losses[best] <= margin)]
    return found


def confirming_runs(study: Study, finished: Sequence[Result]) -> list[Run]:
    """Return the runs of the confirming seeds: best learning rates first, then those close to them.

    Args:
        study: The study.
        finished: Finished runs, also of methods that were taken out since.
    """
    choosing = with_averages(
        r for r in finished if r.run.seed in study.seeds and r.run.method in study.methods
    )
    best: list[Run] = []
    close: list[Run] = []
    for base in study.base_optimizers:
        for reading, lrs in best_lrs(choosing, base, study.confirming_margin).items():
            for seed in study.confirming_seeds:
                first, *others = (Run(base, method_of(reading), lr, seed) for lr in lrs)
                best.append(first)
                close += others
    ordered = [run for runs in (best, close) for run in sorted(runs, key=lambda run: run.seed)]
    return list(dict.fromkeys(ordered))


def judged(results: Sequence[Result], confirming_seeds: Sequence[int]) -> list[Result]:
    """Return what is compared, each average as a method of its own.

    Where confirming seeds have the baseline of a base optimizer these are their runs, at the
    learning rate of each method that the other seeds chose; elsewhere those of the other seeds.
    """
    results = with_averages(results)
    choosing = [r for r in results if r.run.seed not in confirming_seeds]
    best = {base: best_lrs(choosing, base) for base in {r.run.base for r in choosing}}

    def is_confirming(result: Result) -> bool:
        lrs = best.get(result.run.base, {}).get(result.run.method, [])
        return result.run.seed in confirming_seeds and lrs[:1] == [result.run.lr]

    confirmed = {r.run.base for r in results if r.run.method == BASELINE and is_confirming(r)}
    return [
        r
        for r in results
        if (is_confirming(r) if r.run.base in confirmed else r.run.seed not in confirming_seeds)
    ]
