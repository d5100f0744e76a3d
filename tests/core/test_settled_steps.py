"""The optimizer's state where a step raised, or where an older hook of the step reads it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.progress import STEP_KEY
from lightning_ema_nesterov.low_rank import attach_momentum_reset
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.core.problem import Attach, closure_of, direction, start, train
from tests.toys import HalfStep, adamw, equal, relative_error

MAKES: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": adamw,
    "fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
}


def saved_directions(state_dict: dict[str, Any]) -> list[torch.Tensor]:
    return [state[DIRECTION_KEY] for state in state_dict["state"].values()]


def test_state_after_a_step_that_raised_holds_the_direction(attach: Attach) -> None:
    params = start(torch.float64)
    optimizer = HalfStep(params, lr=0.05)
    lookahead = attach(optimizer)
    train(lookahead, params, 3)
    x, m = [p.detach().clone() for p in params], [direction(lookahead, p).clone() for p in params]
    optimizer.fails = True
    with pytest.raises(MemoryError):
        train(lookahead, params, 1)
    first, second = saved_directions(optimizer.state_dict())
    torch.testing.assert_close(first, 0.9 * m[0] + 0.1 * (params[0].detach() - x[0]))
    torch.testing.assert_close(second, m[1])
    torch.testing.assert_close(params[1].detach(), x[1])


@pytest.mark.parametrize("with_reset", [False, True])
def test_hook_that_is_older_saves_the_step_that_ends(attach: Attach, with_reset: bool) -> None:
    saved: list[dict[str, Any]] = []

    def run(*, saves: bool) -> tuple[Lookahead, list[nn.Parameter]]:
        params = start(torch.float64)
        optimizer = torch.optim.SGD(params, lr=0.05, momentum=0.9)
        if saves:
            optimizer.register_step_post_hook(
                lambda *args: saved.append(copy.deepcopy(optimizer.state_dict()))
            )
        if with_reset:
            attach_momentum_reset(optimizer, every_n_steps=3, recovery_steps=2)
        lookahead = attach(optimizer)
        train(lookahead, params, 5)
        return lookahead, params

    lookahead, params = run(saves=True)
    expected, others = run(saves=False)
    assert relative_error(params, others) < 1e-14  # joined passes round in another order
    assert [one["param_groups"][0][STEP_KEY] for one in saved] == [1, 2, 3, 4, 5]
    now = [direction(lookahead, p) for p in params]
    torch.testing.assert_close(saved_directions(saved[-1]), now)
    torch.testing.assert_close(now, [direction(expected, p) for p in others])


def test_hook_that_is_older_may_load(attach: Attach) -> None:
    params = start(torch.float64)
    optimizer = adamw(params)
    states: list[dict[str, Any]] = []

    def load(*args: Any) -> None:
        if states:
            optimizer.load_state_dict(states.pop())

    optimizer.register_step_post_hook(load)
    lookahead = attach(optimizer)
    train(lookahead, params, 2)
    states.append(copy.deepcopy(optimizer.state_dict()))
    m = saved_directions(states[0])
    train(lookahead, params, 1)
    assert lookahead.step_idx == 2
    torch.testing.assert_close([direction(lookahead, p) for p in params], m)


def test_closure_after_a_step_that_raised_starts_from_the_iterate(attach: Attach) -> None:
    def run(*, settles: bool) -> list[nn.Parameter]:
        params = start(torch.float64)
        optimizer = HalfStep(params, lr=0.05)
        lookahead = attach(optimizer)
        closure = closure_of(lookahead, params)
        for fails in (False, False, True, False, False):
            optimizer.fails = fails
            if fails:
                with pytest.raises(MemoryError):
                    optimizer.step(closure)
                if settles:
                    lookahead.retract()
            else:
                optimizer.step(closure)
        lookahead.retract()
        return params

    assert equal(run(settles=False), run(settles=True))


@pytest.mark.parametrize("make", MAKES)
def test_hook_that_raises_after_the_step_leaves_what_the_step_made(
    attach: Attach, make: str
) -> None:
    params = start(torch.float64)
    optimizer = MAKES[make](params)
    made: list[torch.Tensor] = []

    def interrupt(*args: Any) -> None:
        if lookahead.step_idx == 3:
            made.extend(p.detach().clone() for p in params)
            raise KeyboardInterrupt

    optimizer.register_step_post_hook(interrupt)
    lookahead = attach(optimizer)
    train(lookahead, params, 3)
    x, m = [p.detach().clone() for p in params], [direction(lookahead, p).clone() for p in params]
    with pytest.raises(KeyboardInterrupt):
        train(lookahead, params, 1)
    lookahead.retract()
    assert equal(params, made)
    for p, before, old in zip(params, x, m, strict=True):
        expected = 0.9 * old + 0.1 * (p.detach() - before)
        torch.testing.assert_close(direction(lookahead, p), expected)


def test_detached_in_the_closure_the_state_holds_the_direction(attach: Attach) -> None:
    params = start(torch.float64)
    optimizer = adamw(params)
    lookahead = attach(optimizer)
    reset = attach_momentum_reset(optimizer, every_n_steps=9, recovery_steps=2)
    train(lookahead, params, 3)
    m = [direction(lookahead, p).clone() for p in params]

    evaluate = closure_of(lookahead, params)

    def closure() -> Any:
        loss = evaluate()
        lookahead.detach()
        reset.detach()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(saved_directions(optimizer.state_dict()), m)


@pytest.mark.parametrize("looks", [False, True])
def test_step_whose_older_hook_raised_counts(attach: Attach, looks: bool) -> None:
    params = start(torch.float64)
    optimizer = adamw(params)
    raises = [True]

    def fail(*args: Any) -> None:
        if lookahead.step_idx == 2 and raises.pop():
            raise MemoryError("on purpose")

    optimizer.register_step_post_hook(fail)
    lookahead = attach(optimizer)
    raises.append(False)
    train(lookahead, params, 2)
    raises[:] = [False, True]
    with pytest.raises(MemoryError):
        train(lookahead, params, 1)
    if looks:
        optimizer.state_dict()
    train(lookahead, params, 2)
    assert lookahead.step_idx == 5 == int(optimizer.state[params[0]]["step"])
