"""Parameter groups with a step size of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.rule import LookaheadRule
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.rules.ema import EMADirections
from lightning_ema_nesterov.rules.ema_compressed import CompressedDirections
from lightning_ema_nesterov.rules.gpa import GPADirections
from lightning_ema_nesterov.rules.slow_weights import SlowWeights
from tests.core import reference
from tests.core.problem import Attach, direction, gradients, loss_of, start, train
from tests.toys import adamw, equal, relative_error

NUM_STEPS = 60


def grouped(params: list[nn.Parameter], *step_sizes: float | None) -> list[dict[str, Any]]:
    """A group for each parameter, with the key where there is a step size."""
    return [
        {"params": [p]} if size is None else {"params": [p], "lookahead_step_size": size}
        for p, size in zip(params, step_sizes, strict=True)
    ]


def lr_at(step_idx: int) -> float:
    return 1.0 - step_idx / NUM_STEPS


def expected(*step_sizes: float) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The oracle with warmup, rest and a learning rate that falls."""

    def step_size(t: int) -> list[float]:
        return [size * lr_at(t) if 10 <= t < 50 else 0.0 for size in step_sizes]

    return reference.train(
        start(torch.float64),
        gradients,
        adamw,
        num_steps=NUM_STEPS,
        ema_decay=0.9,
        step_size=step_size,
        make_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lr_at),
    )


def train_in_float64(attach: Attach, *step_sizes: float | None) -> tuple[Lookahead, list[Any]]:
    params = start(torch.float64)
    optimizer = adamw(grouped(params, *step_sizes))  # type: ignore[arg-type]  # torch takes both
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_at)
    lookahead = attach(optimizer, warmup=10, rest=10, total_steps=NUM_STEPS)
    for _ in range(NUM_STEPS):
        train(lookahead, params, 1)
        scheduler.step()
    return lookahead, params


@pytest.mark.parametrize("own", [0.2, 0.0, -0.4])
def test_step_size_of_a_group_matches_the_reference(attach: Attach, own: float) -> None:
    """With warmup, rest and learning rate, which scale it like the argument."""
    lookahead, params = train_in_float64(attach, None, own)
    trajectory, expected_m = expected(0.5, own)
    assert relative_error(params, trajectory[-1]) < 1e-12  # float64 rounding over 60 steps
    assert relative_error([direction(lookahead, p) for p in params], expected_m) < 1e-10
    alike, _ = expected(0.5, 0.5)
    assert relative_error(alike[-1], trajectory[-1]) > 1e-4


def test_group_at_zero_trains_as_the_base_optimizer_and_holds_its_average(attach: Attach) -> None:
    params, plain = start(), start()
    lookahead = attach(adamw(grouped(params, 0.0, None)))  # type: ignore[arg-type]  # as above
    optimizer = adamw(plain)
    average = plain[0].detach().double()
    for _ in range(30):
        train(lookahead, params, 1)
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(plain))
        optimizer.step()
        average = 0.9 * average + 0.1 * plain[0].detach().double()
    assert torch.equal(params[0], plain[0])
    assert not torch.equal(params[1], plain[1])
    assert relative_error([plain[0]], [average]) > 1e-3
    with lookahead.at_average():
        assert relative_error([params[0]], [average]) < 1e-5  # float32 rounding


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_compressed_directions_follow_the_group(dtype: str) -> None:
    """The lookahead point of each group is its own step size away, along what is stored."""
    params = start()
    rule = CompressedDirections(adamw(grouped(params, 0.2, None)), 0.9, dtype)  # type: ignore[arg-type]  # as above
    lookahead = Lookahead(rule, LookaheadSchedule(0.5)).attach()
    train(lookahead, params, 10)
    x, m = [p.detach().clone() for p in params], [rule.read_direction(p).clone() for p in params]
    lookahead.extrapolate()
    for p, x_p, m_p, step_size in zip(params, x, m, (0.2, 0.5), strict=True):
        assert m_p.abs().max() > 1e-3
        torch.testing.assert_close(p.detach(), x_p + step_size * m_p)


def test_key_is_saved_and_training_goes_on_bitwise(attach: Attach) -> None:
    params = start()
    lookahead = attach(adamw(grouped(params, 0.2, None)))  # type: ignore[arg-type]  # as above
    train(lookahead, params, 10)
    saved = copy.deepcopy(lookahead.base_optimizer.state_dict())
    assert saved["param_groups"][0]["lookahead_step_size"] == 0.2
    others = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = attach(adamw(grouped(others, 0.4, None)))  # type: ignore[arg-type]  # as above
    resumed.base_optimizer.load_state_dict(saved)
    train(lookahead, params, 10)
    train(resumed, others, 10)
    assert equal(params, others)
    alike = start()
    train(attach(adamw(alike)), alike, 20)
    assert not torch.equal(alike[0], params[0])
    assert torch.equal(alike[1], params[1])


def test_checkpoint_without_the_key_leaves_the_group_what_it_has(attach: Attach) -> None:
    """Torch drops keys that a checkpoint lacks: the group would look ahead with the argument."""
    before, params = start(), start()
    plain = adamw(grouped(before, None, None))  # type: ignore[arg-type]  # as above
    lookahead = attach(adamw(grouped(params, 0.2, None)))  # type: ignore[arg-type]  # as above
    lookahead.base_optimizer.load_state_dict(plain.state_dict())
    sizes = [g.get("lookahead_step_size") for g in lookahead.base_optimizer.param_groups]
    assert sizes == [0.2, None]


def test_parameters_of_one_step_size_move_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[int, float]] = []
    extrapolate = EMADirections.extrapolate

    def counted(rule: EMADirections, params: list[Tensor], step_size: float) -> None:
        moved.append((len(params), step_size))
        extrapolate(rule, params, step_size)

    monkeypatch.setattr(EMADirections, "extrapolate", counted)
    params = [nn.Parameter(torch.ones(2)) for _ in range(4)]
    optimizer = torch.optim.SGD(grouped(params, None, 0.2, 0.5, 0.0), lr=0.1)
    lookahead = Lookahead(EMADirections(optimizer, 0.9), LookaheadSchedule(0.5)).attach()
    for _ in range(2):
        lookahead.extrapolate()
        torch.autograd.backward(torch.stack([p.square().sum() for p in params]).sum())
        optimizer.step()
    assert sorted(moved) == [(1, 0.2), (2, 0.5)]


@pytest.mark.parametrize("value", [1.0, -1.0, "0.5", None, True])
def test_value_out_of_range_is_refused_with_the_name_of_the_group(value: object) -> None:
    groups = grouped([nn.Parameter(torch.ones(2)) for _ in range(2)], None, None)
    groups[1]["role"] = "head"
    rule = EMADirections(torch.optim.SGD(groups, lr=0.1), 0.9)
    [_, group] = rule.base_optimizer.param_groups
    group["lookahead_step_size"] = value
    message = (
        r"^lookahead_step_size of parameter group 1 \(role 'head'\) must be in \(-1, 1\), got "
        f"{value!r}"
    )
    with pytest.raises(ValueError, match=message):
        Lookahead(rule, LookaheadSchedule(0.5)).attach()
    del group["lookahead_step_size"]
    lookahead = Lookahead(rule, LookaheadSchedule(0.5)).attach()
    group["lookahead_step_size"] = value  # later, too
    with pytest.raises(ValueError, match=message):
        lookahead.extrapolate()


@pytest.mark.parametrize(
    "make_rule", [lambda o: GPADirections(o, 0.9), lambda o: SlowWeights(o, 2, 0.8, 0.0)]
)
def test_rules_whose_step_size_is_no_choice_ignore_the_key(
    make_rule: Callable[[torch.optim.Optimizer], LookaheadRule],
) -> None:
    results = []
    for own in (None, 0.9):
        params = start()
        rule = make_rule(adamw(grouped(params, own, None)))  # type: ignore[arg-type]  # as above
        lookahead = Lookahead(rule, LookaheadSchedule(0.3 if rule.keys[0][0] == "g" else 0.0))
        train(lookahead.attach(), params, 8)
        results.append(params)
    assert equal(*results)
    assert not equal(results[0], start())


def test_measured_step_size_is_the_largest_of_all_groups(attach: Attach) -> None:
    params = start()
    lookahead = attach(adamw(grouped(params, 0.2, -0.7)))  # type: ignore[arg-type]  # as above
    train(lookahead, params, 2)
    lookahead.will_measure = True
    train(lookahead, params, 1)
    assert lookahead.metrics is not None
    assert lookahead.metrics.step_size == -0.7
