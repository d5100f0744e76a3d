"""Several optimizers that look like one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ema_nesterov.optimizers.per_role import OptimizerPerRole
from tests.toys import equal


def make_weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, generator=generator)) for _ in range(2)]


def make(weights: list[nn.Parameter]) -> OptimizerPerRole:
    first, second = weights
    return OptimizerPerRole([torch.optim.Adam([first], lr=0.1), torch.optim.SGD([second], lr=0.2)])


def loss_of(weights: list[nn.Parameter]) -> Tensor:
    loss = torch.stack([w.square().sum() for w in weights]).sum()
    loss.backward()  # type: ignore[no-untyped-call]  # torch wrote no types for it
    return loss


def test_each_takes_its_own_step_at_its_ratio_to_the_first() -> None:
    weights, expected = make_weights(), make_weights()
    optimizer = make(weights)
    adam, sgd = torch.optim.Adam(expected[:1], lr=0.1), torch.optim.SGD(expected[1:], lr=0.2)
    untreated = copy.deepcopy(expected)
    for lr in (0.1, 0.05):
        for group in optimizer.param_groups:
            group["lr"] = lr
        adam.param_groups[0]["lr"], sgd.param_groups[0]["lr"] = lr, 2 * lr
        loss_of(weights)
        optimizer.step()
        optimizer.zero_grad()
        assert [group["lr"] for group in optimizer.param_groups] == [lr, lr]
        loss_of(expected)
        adam.step()
        sgd.step()
        adam.zero_grad()
        sgd.zero_grad()
    assert equal(weights, expected)
    assert not any(torch.equal(w, u) for w, u in zip(weights, untreated, strict=True))


def test_a_rate_that_is_a_tensor_is_the_same_after_each_step() -> None:
    weights = make_weights()
    optimizer = make(weights)
    rate = torch.tensor(0.1)
    for group in optimizer.param_groups:
        group["lr"] = rate
    for _ in range(3):
        loss_of(weights)
        optimizer.step()
        assert rate == torch.tensor(0.1)
        assert all(group["lr"] is rate for group in optimizer.param_groups)


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    weights, expected = make_weights(), make_weights()
    calls: list[float] = []

    def closure() -> float:
        calls.append(float(loss_of(weights).detach()))
        return calls[-1]

    assert make(weights).step(closure) == calls[0]
    assert len(calls) == 1
    loss_of(expected)
    make(expected).step()
    assert equal(weights, expected)


def test_what_cannot_be_one_optimizer_is_refused() -> None:
    first, second = make_weights()
    two_groups = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=0.1)
    with pytest.raises(ValueError, match="must have one parameter group, got 2"):
        OptimizerPerRole([two_groups])
    still = torch.optim.SGD([second], lr=0.0)
    with pytest.raises(ValueError, match=r"must be above 0, got \[0.1, 0.0\]"):
        OptimizerPerRole([torch.optim.SGD([first], lr=0.1), still])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_steps_like_the_original(copied: Callable[[Any], Any]) -> None:
    weights = make_weights()
    optimizer = make(weights)
    loss_of(weights)
    optimizer.step()
    others, other = copied((weights, optimizer))
    for params, one in ((weights, optimizer), (others, other)):
        one.zero_grad()
        loss_of(params)
        one.step()
    assert equal(weights, others)
    assert not equal(weights, make_weights())
    other.zero_grad()
    loss_of(others)
    other.step()
    assert not equal(weights, others)


def test_a_group_that_comes_later_is_refused() -> None:
    optimizer = make(make_weights())
    with pytest.raises(RuntimeError, match="must be made with all of its parameters"):
        optimizer.add_param_group({"params": make_weights()})
