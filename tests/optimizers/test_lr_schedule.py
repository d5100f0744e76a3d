"""A learning rate that is flat between a linear warm-up and a decay."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_ema_nesterov.optimizers.lr_schedule import WarmupStableDecay


@pytest.mark.parametrize(
    ("shape", "lrs"),
    [
        # warm-up, warm-up, flat, flat, the first of 4 steps of decay at the peak, ...
        ("linear", [0.4, 0.8, 0.8, 0.8, 0.8, 0.625, 0.45, 0.275, 0.1]),
        ("exponential", [0.4, 0.8, 0.8, 0.8, 0.8, 0.4757, 0.2828, 0.1682, 0.1]),
    ],
)
def test_learning_rate_is_flat_between_warmup_and_decay(shape: Any, lrs: list[float]) -> None:
    schedule = WarmupStableDecay(
        0.8, 0.1, warmup_steps=2, decay_steps=4, total_steps=8, shape=shape
    )
    # The expected values are rounded to four digits.
    assert [schedule.lr_at(t) for t in range(9)] == pytest.approx(lrs, abs=1e-4)


def trapezoid(step_idx: int, num_steps: int, warmup: float, decay: float) -> float:
    """The lower of two lines, up and down, and 1: what the studies were trained with."""
    up = (step_idx + 1) / max(1, round(warmup * num_steps))
    num_decay_steps = round(decay * num_steps)
    down = (num_steps - step_idx) / num_decay_steps if num_decay_steps else 1.0
    return min(1.0, up, down)


@pytest.mark.parametrize(
    ("warmup", "decay"),
    [(0.05, 0.3), (0.05, 0.0), (0.0, 0.3), (0.0, 1.0), (1.0, 0.0), (0.5, 0.5), (0.05, 0.95)],
)
def test_fractions_give_the_lower_of_two_lines_bitwise(warmup: float, decay: float) -> None:
    for num_steps in (*range(1, 60), 997, 1000, 6200):
        schedule = WarmupStableDecay.of_fractions(num_steps, warmup=warmup, decay=decay)
        found = [schedule.lr_at(t) for t in range(num_steps + (decay > 0))]
        assert found == [trapezoid(t, num_steps, warmup, decay) for t in range(len(found))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr must be above 0, got 0.0."),
        ({"min_lr": 0.9}, r"min_lr must be in \[0, 0.8\], up to lr, got 0.9"),
        ({"min_lr": -0.1}, r"min_lr must be in \[0, 0.8\], up to lr, got -0.1"),
        ({"shape": "step"}, "shape must be linear or exponential, got 'step'"),
        ({"shape": "exponential", "min_lr": 0.0}, "min_lr must be above 0 for an exponential"),
        ({"decay_steps": -1}, "warmup_steps and decay_steps must be at least 0, got 2 and -1"),
        ({"decay_steps": 8}, r"must not be longer than the run, got 2 \+ 8 steps of 8"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    kwargs: dict[str, Any] = {
        "lr": 0.8,
        "min_lr": 0.1,
        "warmup_steps": 2,
        "decay_steps": 7,
        "total_steps": 8,
    }
    WarmupStableDecay(**kwargs)
    with pytest.raises(ValueError, match=message):
        WarmupStableDecay(**{**kwargs, **changes})


def test_fractions_of_more_than_the_run_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must not be longer than the run, got 600 \+ 500 steps"):
        WarmupStableDecay.of_fractions(1000, warmup=0.6, decay=0.5)
