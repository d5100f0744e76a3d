"""Momentum reset: any optimizer starts anew, its rate comes back, the direction stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_optimizer import SOAP
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, Adagrad, Adam, AdamW, Muon, NAdam, Optimizer, RMSprop
from torch.optim.lr_scheduler import ExponentialLR

from lightning_ema_nesterov import attach_ema_nesterov
from lightning_ema_nesterov.low_rank import attach_momentum_reset
from lightning_ema_nesterov.optimizers import groups_by_role
from lightning_ema_nesterov.optimizers.per_role import OptimizerPerRole
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.low_rank.toy import LowRankToy, loss_of, rarely, train
from tests.optimizers import tiny
from tests.optimizers.tiny import OPTIMIZERS, TinyLM
from tests.toys import equal, snapshot, through_a_file

Make = Callable[[nn.Module], Optimizer]


def per_role(model: nn.Module) -> Optimizer:
    hidden = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return OptimizerPerRole([Muon(hidden, lr=0.01), AdamW(rest, lr=0.02)])


def of_roles(make: Callable[[Any], Optimizer]) -> Make:
    return lambda model: make(groups_by_role(model))


ANY: dict[str, Make] = {
    "sgd": lambda model: SGD(model.parameters(), lr=0.05),
    "momentum": lambda model: SGD(model.parameters(), lr=0.05, momentum=0.9),
    "adam": lambda model: Adam(model.parameters(), lr=0.01, amsgrad=True),
    "adamw": lambda model: AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
    "fused": lambda model: AdamW(model.parameters(), lr=0.01, fused=True),
    "nadam": lambda model: NAdam(model.parameters(), lr=0.01),
    "rmsprop": lambda model: RMSprop(model.parameters(), lr=0.01, momentum=0.5),
    "soap": lambda model: SOAP(model.parameters(), lr=0.01),
    "per_role": per_role,
    **{name: of_roles(make) for name, make in OPTIMIZERS.items()},
}

QUICK = ("sgd", "adamw", "scale")


@pytest.mark.parametrize("with_method", [False, True])
@pytest.mark.parametrize("name", rarely(ANY, *QUICK))
def test_after_a_reset_any_optimizer_is_as_new(name: str, with_method: bool) -> None:
    """With a step size of 0 the method leaves training alone, and its tensors are in the state."""
    model = TinyLM()
    optimizer = ANY[name](model)
    attach_momentum_reset(optimizer, every_n_steps=4, recovery_steps=0)
    if with_method:
        attach_ema_nesterov(optimizer, model, lookahead_step_size=0.0, warmup=0, rest=0)
    expected = TinyLM()
    tiny.train(expected, ANY[name](expected), 4)
    untreated = copy.deepcopy(expected)
    old = ANY[name](untreated)
    old.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    tiny.train(model, optimizer, 4)
    assert equal(snapshot(model), snapshot(expected))
    saved = through_a_file(optimizer.state_dict())["state"]
    assert saved or name == "sgd"  # the moments are there until the step that begins anew
    tiny.train(model, optimizer, 4, start=4)
    tiny.train(expected, ANY[name](expected), 4, start=4)
    assert equal(snapshot(model), snapshot(expected))
    plain = TinyLM()
    tiny.train(plain, ANY[name](plain), 8)
    # Without moments a restart does nothing.
    assert equal(snapshot(plain), snapshot(model)) == (name == "sgd")


def test_rate_comes_back_and_nobody_else_sees_it() -> None:
    model = LowRankToy()
    optimizer = SGD(model.parameters(), lr=0.1)
    attach_momentum_reset(optimizer, every_n_steps=4, recovery_steps=3)
    scheduler = ExponentialLR(optimizer, 0.9)
    sizes, rates = [], []
    for step_idx in range(10):
        before = model.out.bias.detach().clone()
        rates.append(optimizer.param_groups[0]["lr"])
        train(model, optimizer, 1, start=step_idx)
        assert optimizer.param_groups[0]["lr"] == rates[-1]
        scheduler.step()
        moved = (model.out.bias.detach() - before).norm()
        assert model.out.bias.grad is not None
        sizes.append(float(moved / model.out.bias.grad.norm()))
    assert rates == pytest.approx([0.1 * 0.9**t for t in range(10)], rel=1e-12)
    factors = [1, 1, 1, 1, 1e-3, 0.5005, 1, 1, 1e-3, 0.5005]
    expected = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
    assert sizes == pytest.approx(expected, rel=1e-9)


def test_rate_may_be_a_tensor() -> None:
    model = LowRankToy()
    optimizer = Adam(model.parameters(), lr=torch.tensor(0.1), capturable=False, foreach=False)
    rate = optimizer.param_groups[0]["lr"]
    attach_momentum_reset(optimizer, every_n_steps=2, recovery_steps=2)
    train(model, optimizer, 3)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.1)


@pytest.mark.parametrize("order", ["before", "after"])
def test_step_size_follows_the_rate_and_the_direction_stays(order: str) -> None:
    model = LowRankToy()
    optimizer = AdamW(model.parameters(), lr=0.01)
    options: Any = {"every_n_steps": 4, "recovery_steps": 3}
    if order == "before":
        attach_momentum_reset(optimizer, **options)
    handle = attach_ema_nesterov(optimizer, model, ema_decay=0.9, warmup=0, rest=0)
    if order == "after":
        attach_momentum_reset(optimizer, **options)
    found = []
    for step_idx in range(8):
        state = optimizer.state.get(model.out.weight, {})
        direction = state[DIRECTION_KEY].clone() if state else torch.zeros(())
        handle.measure_next_step()
        train(model, optimizer, 1, start=step_idx)
        assert handle.metrics is not None
        found.append(handle.metrics.step_size)
        after = optimizer.state[model.out.weight][DIRECTION_KEY]
        if step_idx == 4:  # a step of nearly nothing: m decays by gamma + (1 - gamma) beta
            assert float((after - 0.90005 * direction).norm() / direction.norm()) < 0.05
    assert found == pytest.approx([0.0, 0.5, 0.5, 0.5, 0.0005, 0.25025, 0.5, 0.5])


@pytest.mark.parametrize("num_before", rarely(range(1, 9), 5))
def test_resume_is_bitwise_at_every_step(num_before: int) -> None:
    def started(seed: int = 0) -> tuple[LowRankToy, Optimizer]:
        model = LowRankToy(seed=seed)
        optimizer = AdamW(model.parameters(), lr=0.02)
        attach_momentum_reset(optimizer, every_n_steps=4, recovery_steps=3)
        return model, optimizer

    whole, optimizer = started()
    train(whole, optimizer, 9)
    first, before = started()
    train(first, before, num_before)
    for through in ("file", "distributed"):
        second, after = started(seed=1)
        second.load_state_dict(first.state_dict())
        if through == "file":
            after.load_state_dict(through_a_file(before.state_dict()))
        else:
            saved = get_optimizer_state_dict(first, before)
            set_optimizer_state_dict(second, after, saved)
        train(second, after, 9 - num_before, start=num_before)
        assert equal(snapshot(second), snapshot(whole)), through
    plain = LowRankToy()
    train(plain, AdamW(plain.parameters(), lr=0.02), 9)
    assert not equal(snapshot(plain), snapshot(whole))


def test_checkpoint_of_a_multiple_goes_on_without_the_reset() -> None:
    model = LowRankToy()
    optimizer = AdamW(model.parameters(), lr=0.02)
    handle = attach_momentum_reset(optimizer, every_n_steps=4, recovery_steps=3)
    attach_ema_nesterov(optimizer, model, warmup=0, rest=0).detach()
    train(model, optimizer, 4)
    handle.detach()
    other = copy.deepcopy(model)
    plain = AdamW(other.parameters(), lr=0.02)
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    train(model, optimizer, 3, start=4)
    train(other, plain, 3, start=4)
    assert equal(snapshot(model), snapshot(other))
    assert float(plain.state[other.out.weight]["step"]) == 7


def test_parameter_without_gradient_keeps_its_state() -> None:
    model = LowRankToy()
    optimizer = AdamW(model.parameters(), lr=0.02)
    attach_ema_nesterov(optimizer, model, warmup=0, rest=0)
    attach_momentum_reset(optimizer, every_n_steps=2, recovery_steps=0)
    train(model, optimizer, 2)
    optimizer.zero_grad()
    before = model.out.weight.detach().clone()
    loss_of(model, 2).backward()  # type: ignore[no-untyped-call]  # of torch
    model.out.weight.grad = None
    optimizer.step()
    # Back from the lookahead point, by one unit in the last place.
    torch.testing.assert_close(model.out.weight.detach(), before, rtol=1e-15, atol=0)
    assert float(optimizer.state[model.out.weight]["step"]) == 2
    assert float(optimizer.state[model.out.bias]["step"]) == 1
    train(model, optimizer, 4, start=3)
    assert all(p.isfinite().all() for p in model.parameters())
    assert DIRECTION_KEY in optimizer.state[model.out.weight]


class Failing(SGD):
    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise MemoryError("on purpose")
        return super().step(closure)


def test_step_that_raises_leaves_rate_and_direction() -> None:
    model = LowRankToy()
    optimizer = Failing(model.parameters(), lr=0.02, momentum=0.9)
    attach_momentum_reset(optimizer, every_n_steps=2, recovery_steps=2)
    handle = attach_ema_nesterov(optimizer, model, warmup=0, rest=0)
    train(model, optimizer, 2)
    direction = optimizer.state[model.out.weight][DIRECTION_KEY].clone()
    optimizer.fails = True
    with pytest.raises(MemoryError):
        train(model, optimizer, 1, start=2)
    with handle.at_iterate():
        saved = optimizer.state_dict()  # what is under way is undone before anyone looks
        # From the fold and the point it was taken at, with their rounding.
        after = optimizer.state[model.out.weight][DIRECTION_KEY]
        torch.testing.assert_close(after, direction, rtol=1e-9, atol=1e-12)
    assert saved["param_groups"][0]["lr"] == 0.02
    optimizer.fails = False
    train(model, optimizer, 2, start=2)
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert all(p.isfinite().all() for p in model.parameters())


def test_closure_is_called_with_gradients() -> None:
    model, twin = LowRankToy(), LowRankToy()
    optimizer, other = (AdamW(m.parameters(), lr=0.02) for m in (model, twin))
    for o in (optimizer, other):
        attach_momentum_reset(o, every_n_steps=2, recovery_steps=2)
    for step_idx in range(5):

        def closure(step_idx: int = step_idx) -> Any:
            optimizer.zero_grad()
            loss = loss_of(model, step_idx)
            loss.backward()  # type: ignore[no-untyped-call]  # of torch
            return loss.detach()

        optimizer.step(closure)
    train(twin, other, 5)
    assert equal(snapshot(model), snapshot(twin))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be a whole number of at least 1, got 0"),
        ({"every_n_steps": 2.5}, "every_n_steps must be a whole number"),
        ({"recovery_steps": -1}, "recovery_steps must be a whole number of at least 0, got -1"),
        ({"every_n_steps": 5, "recovery_steps": 6}, "recovery_steps must be at most every_n_steps"),
    ],
)
def test_bad_input_is_one_error(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach_momentum_reset(SGD(LowRankToy().parameters(), lr=0.1), **kwargs)


def test_optimizer_that_makes_its_state_early_is_refused() -> None:
    with pytest.raises(ValueError, match="must make its state in its first step, and Adagrad"):
        attach_momentum_reset(Adagrad(LowRankToy().parameters()))
