"""Ctrl-C and failures in the middle of a move of the parameters."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_ema_nesterov import EMANesterovHandle, attach_ema_nesterov
from lightning_ema_nesterov.core.interrupts import uninterrupted
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY

INPUTS = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

Trained = tuple[nn.Module, torch.optim.Optimizer, EMANesterovHandle]


class AfterOperation(TorchFunctionMode):
    """Does something behind one operation of torch: the first, the second and so on."""

    def __init__(self, number: int, action: Callable[[], None]) -> None:
        super().__init__()
        self.num_left = number
        self.action = action

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Torch's own no_grad() does not survive a Ctrl-C in between.
        self.num_left -= func is not torch._C._set_grad_enabled
        if self.num_left == 0:
            self.num_left = -1
            self.action()
        return result


def trained(num_steps: int = 5, **kwargs: Any) -> Trained:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    options: dict[str, Any] = {"ema_decay": 0.9, "warmup": 0, "rest": 0, **kwargs}
    handle = attach_ema_nesterov(optimizer, model, **options)
    for _ in range(num_steps):
        step(model, optimizer, handle)
    return model, optimizer, handle


def step(model: nn.Module, optimizer: torch.optim.Optimizer, handle: EMANesterovHandle) -> None:
    optimizer.zero_grad()
    model(INPUTS).square().mean().backward()
    optimizer.step()


def look_at_average(
    model: nn.Module, optimizer: torch.optim.Optimizer, handle: EMANesterovHandle
) -> None:
    with handle.at_average(), torch.no_grad():
        model(INPUTS)


def look_in_window(
    model: nn.Module, optimizer: torch.optim.Optimizer, handle: EMANesterovHandle
) -> None:
    loss = model(INPUTS).square().mean()
    model.state_dict()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def weights_and_directions(one: Trained) -> list[tuple[Tensor, Tensor]]:
    model, optimizer, _ = one
    return [(p.detach().clone(), optimizer.state[p][DIRECTION_KEY]) for p in model.parameters()]


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("action", [step, look_at_average, look_in_window])
def test_ctrl_c_behind_any_operation_leaves_an_iterate_and_its_direction(
    action: Callable[..., None],
) -> None:
    states = [trained(num_steps) for num_steps in (5, 6)]
    for _, _, handle in states:
        handle.detach()
    iterates = list(map(weights_and_directions, states))
    number = 0
    while True:
        number += 1
        one = trained()
        behind = AfterOperation(number, interrupt)
        try:
            with behind:
                action(*one)
        except KeyboardInterrupt:
            pass
        if behind.num_left >= 0:
            break  # so many operations it has not
        one[2].detach()
        for idx, (weight, direction) in enumerate(weights_and_directions(one)):
            off = [
                max((weight - w[idx][0]).abs().max(), (direction - w[idx][1]).abs().max())
                for w in iterates
            ]
            assert min(off) < 1e-8, (number, idx, off)  # a direction is float32
    assert number > 10


@pytest.mark.parametrize("direction_dtype", ["float32", "bfloat16"])
def test_memory_that_runs_out_where_a_step_begins_leaves_the_iterate(direction_dtype: Any) -> None:
    expected = weights_and_directions(trained(direction_dtype=direction_dtype))
    model, optimizer, handle = trained(direction_dtype=direction_dtype)
    optimizer.zero_grad()
    model(INPUTS).square().mean().backward()
    handle.measure_next_step()

    with pytest.raises(torch.OutOfMemoryError), AfterOperation(1, run_out_of_memory):
        optimizer.step()
    saved = list(model.state_dict().values())
    handle.detach()
    for p, state, (weight, _) in zip(model.parameters(), saved, expected, strict=True):
        assert (state - weight).abs().max() < 1e-15
        assert (p - weight).abs().max() < 1e-15


def test_memory_that_runs_out_on_the_way_to_the_average_leaves_the_iterate() -> None:
    model, _, handle = trained()
    before = [p.detach().clone() for p in model.parameters()]

    number = 0
    while True:
        number += 1
        average = handle.at_average()
        try:
            with AfterOperation(number, run_out_of_memory):
                average.__enter__()
        except torch.OutOfMemoryError:
            for p, weight in zip(model.parameters(), before, strict=True):
                assert torch.equal(p, weight)
        else:
            average.__exit__(None, None, None)
            break
    assert number > 2


def test_ctrl_c_waits_and_a_second_one_does_not() -> None:
    reached = []

    @uninterrupted
    def press(how_often: int) -> None:
        press_here(how_often)

    @uninterrupted
    def press_here(how_often: int) -> None:
        for number in range(how_often):
            interrupt()
            reached.append(number)

    for how_often in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            press(how_often)
    assert reached == [0, 0]
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_a_thread_is_not_held() -> None:
    found = []

    @uninterrupted
    def note() -> None:
        found.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    note()
    assert found.pop() is not before
    thread = threading.Thread(target=note)
    thread.start()
    thread.join()
    assert found == [before]
    assert signal.getsignal(signal.SIGINT) is before
