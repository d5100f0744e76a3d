"""The step size over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from lightning_ema_nesterov.core.progress import MAX_LR_KEY, STEP_KEY, Progress, largest_lr
from lightning_ema_nesterov.core.schedule import LookaheadSchedule


@pytest.mark.parametrize(
    ("warmup", "rest", "expected"),
    [
        (0, 0, [0.5] * 10),  # always
        (3, 0, [0.0] * 3 + [0.5] * 7),  # first three steps off
        (0, 2, [0.5] * 8 + [0.0] * 2),  # last two steps off
        (0.1, 0.15, [0.0] + [0.5] * 7 + [0.0] * 2),  # fractions: 1 step, and 1.5 rounded to 2
        (1, 0.5, [0.0] + [0.5] * 4 + [0.0] * 5),  # a count and a fraction
        (6, 4, [0.0] * 10),  # they meet: never
        (1.0, 0, [0.0] * 10),  # a float 1 is the whole run
        (1, 0, [0.0] + [0.5] * 9),  # an int 1 is one step
    ],
)
def test_step_sizes_of_a_run(warmup: float, rest: float, expected: list[float]) -> None:
    schedule = LookaheadSchedule(0.5, warmup=warmup, rest=rest, total_steps=10)
    assert [schedule.step_size(step_idx) for step_idx in range(10)] == expected
    assert schedule.has_active_steps == any(expected)


def test_a_run_that_goes_on_rests() -> None:
    schedule = LookaheadSchedule(0.5, rest=2, total_steps=10)
    assert schedule.step_size(10) == 0.0
    assert LookaheadSchedule(0.5, warmup=2).step_size(10**9) == 0.5


def test_step_size_follows_the_learning_rate_only_when_asked() -> None:
    assert LookaheadSchedule(0.5).step_size(0, lr_ratio=0.25) == 0.125
    assert LookaheadSchedule(0.5, scale_with_lr=False).step_size(0, lr_ratio=0.25) == 0.5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"warmup": 8, "rest": 3}, r"got 8 \+ 3 steps in a run of 10"),
        ({"warmup": 0.9, "rest": 0.2}, r"got 9 \+ 2 steps in a run of 10"),
        ({"total_steps": None, "warmup": 0.1}, "warmup = 0.1 is a fraction of the run"),
        ({"total_steps": None, "rest": 0.1}, "rest = 0.1 is a fraction of the run"),
        ({"total_steps": None, "rest": 5}, "rest = 5 counts from the end of the run"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(
    kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LookaheadSchedule(**{"lookahead_step_size": 0.5, "total_steps": 10, **kwargs})


@pytest.mark.parametrize("warmup", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_shares_that_fill_the_run_fit_every_run(warmup: float) -> None:
    for total_steps in range(1, 40):
        schedule = LookaheadSchedule(0.5, warmup=warmup, rest=1.0 - warmup, total_steps=total_steps)
        # Each is rounded; where both are rounded down, a step is left.
        assert 0 <= total_steps - schedule.warmup_steps - schedule.rest_steps <= 1


def lr_ratios(
    make_scheduler: Callable[[torch.optim.Optimizer], Any] | None, num_steps: int
) -> list[float]:
    """Ratios of 0.1 * multiplier, read before each step as the callback does."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    progress, ratios = Progress(optimizer), []
    for _ in range(num_steps):
        ratios.append(progress.lr_ratio(0))
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()
    return ratios


@pytest.mark.parametrize(
    ("make_scheduler", "expected"),
    [
        # No scheduler: the learning rate is its own maximum.
        (None, [1, 1, 1, 1]),
        # initial_lr is the maximum, also while the learning rate warms up.
        (lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 2)), [0, 0.5, 1, 1]),
        (lambda o: lr_scheduler.StepLR(o, 2, 0.1), [1, 1, 0.1, 0.1]),
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 2), [1, 0.5, 0, 0.5]),
        (lambda o: lr_scheduler.LinearLR(o, 0.5, 1.0, 2), [0.5, 0.75, 1, 1]),
        (lambda o: lr_scheduler.ExponentialLR(o, 0.5), [1, 0.5, 0.25, 0.125]),
        # No initial_lr: the learning rate at the start.
        (lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0), [1, 1, 0.5, 0.25]),
        # max_lr = 0.1 is in the group; initial_lr = 0.1 / 25 is not the maximum.
        (
            lambda o: lr_scheduler.OneCycleLR(
                o, 0.1, total_steps=4, pct_start=0.5, anneal_strategy="linear"
            ),
            [0.04, 1, 0.500002, 4e-6],
        ),
        # CyclicLR does not tell its maximum: the running one never gives more than 1.
        (lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2), [1, 1, 1, 0.55]),
        # A multiplier above 1 raises the maximum.
        (lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 + t % 2), [1, 1, 0.5, 1]),
        (
            lambda o: lr_scheduler.SequentialLR(
                o,
                [lr_scheduler.ConstantLR(o, 0.5, 9), lr_scheduler.ExponentialLR(o, 0.5)],
                milestones=[2],
            ),
            [0.5, 0.5, 1, 0.5],
        ),
        (
            lambda o: lr_scheduler.ChainedScheduler(
                [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.5)]
            ),
            [0.5, 0.25, 0.25, 0.125],
        ),
    ],
)
def test_ratio_to_the_largest_learning_rate(
    make_scheduler: Callable[[torch.optim.Optimizer], Any] | None, expected: list[float]
) -> None:
    assert lr_ratios(make_scheduler, 4) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_reference_is_the_group_max_lr_when_the_user_sets_it() -> None:
    assert largest_lr({"initial_lr": 0.2, "max_lr": 0.4}, lr=0.1) == 0.4


@pytest.mark.parametrize("peak", [0.001, 0.4])
def test_a_scheduler_made_after_attaching_tells_its_peak(peak: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    progress = Progress(optimizer)
    progress.register()
    scheduler = lr_scheduler.OneCycleLR(
        optimizer, peak, total_steps=4, pct_start=0.5, anneal_strategy="linear"
    )
    ratios = []
    for t in range(4):
        ratios.append(progress.lr_ratio(0))
        optimizer.step()
        progress.step_idx = t + 1
        if t < 3:
            scheduler.step()
    assert ratios == pytest.approx([0.04, 1, 0.500002, 4e-6], rel=1e-4)


def test_progress_is_saved_with_the_optimizer_and_not_in_its_groups() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    keys = set(optimizer.param_groups[0])
    progress = Progress(optimizer)
    progress.register()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    assert progress.lr_ratio(0) == pytest.approx(0.25)
    progress.step_idx = 7
    assert set(optimizer.param_groups[0]) == keys
    saved = optimizer.state_dict()
    assert saved["param_groups"][0][STEP_KEY] == 7
    assert saved["param_groups"][0][MAX_LR_KEY] == pytest.approx(0.4)
    # set_optimizer_state_dict of torch loads a flattened state only where the groups have it.
    assert set(optimizer.param_groups[0]) == {*keys, STEP_KEY, MAX_LR_KEY}
    progress.step_idx += 1
    assert set(optimizer.param_groups[0]) == keys
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    resumed = Progress(other)
    resumed.register()
    other.load_state_dict(saved)
    assert set(other.param_groups[0]) == keys
    assert (resumed.step_idx, resumed.is_new) == (7, False)
    assert resumed.lr_ratio(0) == pytest.approx(0.25)
    resumed.leave()
    again = Progress(other)
    again.register()
    assert again.step_idx == 7
    assert again.lr_ratio(0) == pytest.approx(0.25)


def test_largest_learning_rate_stays_the_one_that_was_seen() -> None:
    """Above ``max_lr`` of the group, and above what a scheduler tells after a checkpoint."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    [group] = optimizer.param_groups
    group["max_lr"] = 0.2
    progress = Progress(optimizer)
    assert progress.lr_ratio(0) == 1.0
    progress.step_idx = 1
    group["lr"] = 0.1
    assert progress.lr_ratio(0) == pytest.approx(0.25)
    progress.set_max_lr(0, 1.0)
    assert progress.lr_ratio(0) == pytest.approx(0.25)


def test_zero_or_missing_learning_rate() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    assert Progress(torch.optim.SGD([p], lr=0.0)).lr_ratio(0) == 0.0
    optimizer = torch.optim.SGD([p], lr=0.1)
    del optimizer.param_groups[0]["lr"]
    assert Progress(optimizer).lr_ratio(0) == 1.0
