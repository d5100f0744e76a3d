"""A small convex problem, and how the tests of the core train on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY

Attach = Callable[..., Lookahead]
"""Attaches one form of the rule to an optimizer; takes its decay and those of the schedule."""

CURVATURE = torch.diag(torch.linspace(0.1, 2.0, 6, dtype=torch.float64))


def start(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (6, 2)]
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [nn.Parameter(value.to(device, dtype)) for value in values]


def loss_of(params: Iterable[Tensor]) -> Tensor:
    terms = [0.5 * (p * (CURVATURE.to(p) @ p)).sum() + p.sin().sum() for p in params]
    return torch.stack(terms).sum()


def gradients(params: list[Tensor], step_idx: int) -> list[Tensor]:
    return [CURVATURE.to(p) @ p + p.cos() for p in params]


def train(lookahead: Lookahead, params: list[nn.Parameter], num_steps: int) -> None:
    for _ in range(num_steps):
        lookahead.base_optimizer.zero_grad()
        lookahead.extrapolate()
        torch.autograd.backward(loss_of(params))
        lookahead.base_optimizer.step()


def closure_of(lookahead: Lookahead, params: list[nn.Parameter]) -> Callable[[], Any]:
    """The closure of a step, as the Trainer makes one: it moves to the lookahead point itself."""

    def closure() -> Tensor:
        lookahead.base_optimizer.zero_grad()
        lookahead.extrapolate()
        loss = loss_of(params)
        torch.autograd.backward(loss)
        return loss

    return closure


def direction(lookahead: Lookahead, p: Tensor) -> Tensor:
    lookahead.rule.make_state_readable()
    tensor: Tensor = lookahead.base_optimizer.state[p][DIRECTION_KEY]
    return tensor
