"""Base optimizers and arguments that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_ema_nesterov.rules.ema import EMADirections
from tests.core.problem import Attach, start


def test_optimizer_that_ignores_its_closure_is_refused(attach: Attach) -> None:
    class Deaf(torch.optim.SGD):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            return None

    params = start()
    optimizer = Deaf(params, lr=0.1)
    attach(optimizer)
    with pytest.raises(RuntimeError, match=r"Deaf.step\(\) must call the closure"):
        optimizer.step(lambda: None)


def test_optimizer_that_moves_before_its_closure_is_refused(attach: Attach) -> None:
    class Sharpness(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            assert closure is not None
            for p in self.param_groups[0]["params"]:
                p.add_(0.01)
            return closure()

    params = start()
    optimizer = Sharpness(params, lr=0.1)
    attach(optimizer)
    with pytest.raises(RuntimeError, match=r"does not support optimizers .* like SAM"):
        optimizer.step(lambda: None)


def test_an_optimizer_that_saves_the_state_of_another_is_refused() -> None:
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        """By the name of torch's, which wants processes."""

    with pytest.raises(ValueError, match=r"directions would be lost\. Shard with FSDP2"):
        EMADirections(ZeroRedundancyOptimizer(start(), lr=0.1), 0.9)


def test_a_rule_needs_an_optimizer() -> None:
    with pytest.raises(
        TypeError, match=r"base_optimizer must be a torch.optim.Optimizer, got .*list"
    ):
        EMADirections([], 0.9)  # type: ignore[arg-type]  # the wrong type is the test
