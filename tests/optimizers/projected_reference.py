"""GaLore, Fira and APOLLO in float64, one matrix at a time: the oracle of their tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.optimizers.tiny import random_gradients

SHAPES = [(12, 8), (8, 12), (8, 8), (5,)]
LR, RANK, GAP, DECAY = 0.01, 3, 4, 0.1
BETA1, BETA2, EPS = 0.9, 0.999, 1e-6
NUM_STEPS = 14  # refreshes before the steps 0, 4, 8, 12

# From the gradient, its projection from the right, Adam's direction there and the projection.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
Project = Callable[[Tensor, int, int], Tensor]


def singular(g: Tensor, place: int, num_refreshes: int) -> Tensor:
    """The leading singular vectors of the smaller side, as rows, in float32 like the authors'.

    Their signs matter, as the moments are not rotated: the gradient itself is decomposed.
    """
    left, _, right = torch.linalg.svd(g.float(), full_matrices=False)
    rows: Tensor = right[:RANK] if g.shape[0] >= g.shape[1] else left[:, :RANK].T
    return rows.double()


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in SHAPES
    ]


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:-1], "role": "hidden"}, {"params": params[-1:], "role": "other"}]


def run(make: Callable[[list[dict[str, Any]]], Optimizer]) -> list[Tensor]:
    params = parameters()
    optimizer = make(groups(params))
    for t in range(NUM_STEPS):
        for p, g in zip(params, random_gradients(params, t), strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in params]


def expected(rule: Rule, project: Project = singular) -> list[Tensor]:
    result = []
    for place, p in enumerate(parameters(), start=1):
        w = p.detach().clone()
        memory: dict[str, Any] = {}
        m = v = torch.zeros(())
        projection = torch.zeros(())
        for t in range(NUM_STEPS):
            g = random_gradients(parameters(), t)[place - 1]
            is_wide = g.ndim == 2 and g.shape[0] < g.shape[1]
            if g.ndim == 2 and t % GAP == 0:
                projection = project(g, place, t // GAP)
            g = g.T if is_wide else g
            low = g @ projection.T if g.ndim == 2 else g
            m = BETA1 * m + (1 - BETA1) * low
            v = BETA2 * v + (1 - BETA2) * low * low
            direction = m / (v.sqrt() + EPS)
            update = rule(g, low, direction, projection, memory) if g.ndim == 2 else direction
            update = update.T if is_wide else update
            rate = LR * (1 - BETA2 ** (t + 1)) ** 0.5 / (1 - BETA1 ** (t + 1))
            w = (w - rate * update) * (1 - LR * DECAY)
        result.append(w)
    return result


def limited(update: Tensor, memory: dict[str, Any]) -> Tensor:
    """Let the norm grow by 1 % at most."""
    size = float(update.square().sum()) ** 0.5
    if "last" in memory:
        allowed = 1.01 * (memory["last"] + 1e-8)
        if size > allowed:
            update, size = update * allowed / size, allowed
            memory["limited"] = True
    memory["last"] = size
    return update


def row_factors(direction: Tensor, low: Tensor) -> Tensor:
    sizes: list[Tensor] = [t.square().sum(dim=1, keepdim=True).sqrt() for t in (direction, low)]
    return sizes[0] / (sizes[1] + 1e-8)
