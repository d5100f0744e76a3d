"""A network that is attached to, and the slow recursion that its training must equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ema_nesterov import attach_ema_nesterov

DECAY, STEP_SIZE, NUM_STEPS = 0.8, 0.5, 12
GENERATOR = torch.Generator().manual_seed(5)
STATES = torch.randn(16, 6, generator=GENERATOR, dtype=torch.float64)
REWARDS = torch.randn(16, 3, generator=GENERATOR, dtype=torch.float64)


class QNetwork(nn.Module):
    """An encoder, a norm and a head; nothing random in it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 7), nn.GELU())
        self.norm, self.head = nn.LayerNorm(7), nn.Linear(7, 3)
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.6)

    def forward(self, states: Tensor) -> Tensor:
        q: Tensor = self.head(self.norm(self.encoder(states)))
        return q


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def attach(optimizer: Any, module: nn.Module, **kwargs: Any) -> Any:
    options = {"ema_decay": DECAY, "warmup": 0, "rest": 0, **kwargs}
    return attach_ema_nesterov(optimizer, module, **options)


def attached(num_steps: int = NUM_STEPS) -> tuple[QNetwork, torch.optim.Optimizer, Any]:
    """Return a network in the middle of its training, all of it at the iterate."""
    model = QNetwork()
    optimizer = sgd(model.parameters())
    handle = attach(optimizer, model)
    for _ in range(num_steps):
        train_step(model, optimizer)
    return model, optimizer, handle


def train_step(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    (model(STATES) - REWARDS).square().mean().backward()
    optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


Targets = Callable[[QNetwork, list[Tensor], int], Tensor]
"""Maps a network at the iterate, the first iterate and the step to what is regressed on."""


def by_recursion(targets: Targets, step_size: float = STEP_SIZE) -> list[Tensor]:
    """Train by the paper's loop; the targets of a step are computed at x, its gradient at y."""
    at_x, at_y = QNetwork(), QNetwork()
    x, m = weights(at_x), [torch.zeros_like(p) for p in at_x.parameters()]
    optimizer = sgd(at_y.parameters())
    for t in range(NUM_STEPS):
        with torch.no_grad():
            for p, q, x_i, m_i in zip(at_x.parameters(), at_y.parameters(), x, m, strict=True):
                p.copy_(x_i)
                q.copy_(x_i + step_size * m_i)
            wanted = targets(at_x, x, t)
        optimizer.zero_grad()
        (at_y(STATES) - wanted).square().mean().backward()
        optimizer.step()
        x_next = weights(at_y)
        m = [DECAY * m_i + (1 - DECAY) * (b - a) for m_i, a, b in zip(m, x, x_next, strict=True)]
        x = x_next
    return x


def check(model: nn.Module, targets: Targets) -> None:
    expected = by_recursion(targets)
    torch.testing.assert_close(weights(model), expected, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(by_recursion(targets, 0.0)[0], expected[0], rtol=1e-3)
