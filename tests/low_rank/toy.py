"""A small model with low-rank layers, its gradients, and what these tests share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ema_nesterov.low_rank import LowRankLinear


class LowRankToy(nn.Module):
    """Two low-rank layers and a dense one, of float64 numbers unless a test wants others."""

    def __init__(
        self, *, dtype: torch.dtype = torch.float64, sparsity: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = LowRankLinear(5, 7, rank=3, alpha=6.0, sparsity=sparsity)
            self.second = LowRankLinear(7, 6, rank=2, alpha=6.0, sparsity=sparsity, bias=False)
            self.out = nn.Linear(6, 2)
            if sparsity:  # at B = 0 a product has no rank to speak of
                nn.init.normal_(self.first.B, std=0.3)
                nn.init.normal_(self.second.B, std=0.3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return y

    @property
    def layers(self) -> list[LowRankLinear]:
        return [self.first, self.second]


def loss_of(model: nn.Module, step_idx: int) -> Tensor:
    generator = torch.Generator().manual_seed(step_idx)
    numbers = torch.randn(8, 7, generator=generator, dtype=torch.float64)
    numbers = numbers.to(next(model.parameters()).dtype)
    error: Tensor = model(numbers[:, :5]) - numbers[:, 5:]
    return error.square().mean()


def train(model: nn.Module, optimizer: Optimizer, num_steps: int, *, start: int = 0) -> None:
    for step_idx in range(start, start + num_steps):
        optimizer.zero_grad()
        loss_of(model, step_idx).backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer.step()


def rarely(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """Return cases, of which the quick lane has a few."""
    return [pytest.param(c, marks=[] if c in quick else [pytest.mark.slow]) for c in cases]


def weights(model: LowRankToy) -> list[Tensor]:
    """The weights of all layers, which do not depend on how they are factorized."""
    return [*(m.dense_weight().detach() for m in model.layers), model.out.weight.detach().clone()]
