"""What a table says of seeds, rates and curves that are hard to compare: made-up results."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lightning_ema_nesterov.experiments.event_files import Point
from lightning_ema_nesterov.experiments.study.load import load_study
from lightning_ema_nesterov.experiments.study.rounds import best_lrs, confirming_runs, judged
from lightning_ema_nesterov.experiments.study.spec import Run
from lightning_ema_nesterov.experiments.study.tables import (
    mean_curve,
    paired_difference,
    standings,
)
from tests.experiments.toys import result, write


def test_seeds_that_confirm_choose_no_rate_when_a_study_continues(tmp_path: Path) -> None:
    optimizers = {"sgd": {"class_path": "SGD", "lrs": [0.1, 0.2]}}
    path = write(
        tmp_path,
        base_optimizers=optimizers,
        methods={"none": None},
        seeds=[0],
        confirming_seeds=[1, 2],
    )
    finished = [result("none", 0.1, 0, [1.0]), result("none", 0.2, 0, [2.0])]
    finished.append(result("none", 0.2, 1, [0.5]))
    expected = [Run("sgd", "none", 0.1, seed) for seed in (1, 2)]
    assert confirming_runs(load_study(path), finished) == expected


def test_rate_is_chosen_by_the_mean_of_those_that_all_seeds_have() -> None:
    losses = {0.1: [1.0, 5.0], 0.2: [2.0, 2.0], 0.3: [0.5]}
    found = [
        result("none", lr, seed, [loss])
        for lr, of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds)
    ]
    assert best_lrs(found, "sgd") == {"none": [0.2]}
    assert best_lrs(found, "sgd", margin=1.5) == {"none": [0.2, 0.1]}


def test_average_is_confirmed_by_the_run_it_is_read_from(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, seeds=[0], confirming_seeds=[1]))
    at_average = {1.0: [Point(10, 0.0, 1.0)]}
    finished = [result("ema", 0.05, 0, [2.0], at_average=at_average)]
    assert confirming_runs(study, finished) == [Run("sgd", "ema", 0.05, 1)]


def test_base_is_confirmed_where_its_baseline_is() -> None:
    found = [result(method, 0.1, 0, [1.0]) for method in ("none", "ema")]
    confirming = [result(method, 0.1, 1, [1.0]) for method in ("ema", "none")]
    assert judged([*found, confirming[0]], [1]) == found
    assert judged([*found, *confirming], [1]) == confirming


def test_one_diverged_seed_leaves_no_interval_and_is_not_in_the_curve() -> None:
    diverged = result("ema", 0.1, 1, [9.0], is_diverged=True)
    ema = {0: result("ema", 0.1, 0, [3.0, 2.0]), 1: diverged}
    none = {seed: result("none", 0.1, seed, [3.0, 2.5]) for seed in (0, 1)}
    assert paired_difference(ema, none) == (math.inf, math.inf, math.inf)
    assert mean_curve(ema.values()) == [(10, 3.0, 0.0), (20, 2.0, 0.0)]


@pytest.mark.parametrize(("step_sizes", "rate"), [((0.3, 0.3), 0.143), ((0.5, 0.0), 0.2)])
def test_gained_baseline_has_the_rate_of_a_steady_update(
    step_sizes: tuple[float, float], rate: float
) -> None:
    """A seed that diverged in the warmup has logged a step size of 0."""
    found = [result("none", lr, seed, [lr * 10]) for lr in (0.1, rate) for seed in (0, 1)]
    found += [
        result("ema", 0.1, seed, [0.9], step_size=step_size)
        for seed, step_size in enumerate(step_sizes)
    ]
    _, ema = standings(found, "sgd")
    assert ema.gained == [rate * 10] * 2
    assert ema.gained_lr == rate


def test_method_that_does_not_look_ahead_has_no_gained_baseline() -> None:
    found = [result("none", 0.1, 0, [2.0]), result("ema", 0.1, 0, [1.0])]
    assert standings(found, "sgd")[1].gained == []


def test_rate_with_too_few_seeds_hides_no_edge() -> None:
    found = [result("none", lr, seed, [lr]) for lr in (0.1, 0.2) for seed in (0, 1)]
    found.append(result("none", 0.05, 0, [9.0]))
    assert standings(found, "sgd")[0].edge == "smallest"
