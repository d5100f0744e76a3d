"""Fira against its mathematics in float64, and its limiter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ema_nesterov.optimizers import Fira, groups_by_role
from tests.optimizers import projected_reference as reference
from tests.optimizers.tiny import HIDDEN, WIDTH, TinyLM, state_elements, train


@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_steps_match_the_mathematics_across_refreshes(scale: float) -> None:
    memories: list[dict[str, Any]] = []

    def rule(g: Tensor, low: Tensor, d: Tensor, p: Tensor, memory: dict[str, Any]) -> Tensor:
        memories.append(memory)
        # Only the share `scale` of the projection is taken off, as in the authors' code.
        residual = (g - scale * low @ p) * reference.row_factors(d, low)
        return scale * d @ p + reference.limited(residual, memory)

    found = reference.run(
        lambda groups: Fira(
            groups, lr=0.01, rank=3, update_proj_gap=4, scale=scale, weight_decay=0.1
        )
    )
    for p, w in zip(found, reference.expected(rule), strict=True):
        torch.testing.assert_close(p, w, rtol=0, atol=1e-9)
    assert all(memory["limited"] for memory in memories)  # the limiter acted


def test_state_is_galores_and_a_norm() -> None:
    model = TinyLM()
    optimizer = Fira(groups_by_role(model), rank=3)
    train(model, optimizer, 2)
    assert state_elements(optimizer, model.up.weight) == 2 * HIDDEN * 3 + WIDTH * 3
    norm = optimizer.state[model.up.weight]["residual_norm"]
    assert (norm.shape, norm.dtype) == ((), torch.float32)


def test_residual_is_not_stuck_after_a_zero_gradient() -> None:
    def moved(num_zeros: int) -> float:
        p = nn.Parameter(torch.zeros(8, 8))
        optimizer = Fira([{"params": [p], "role": "hidden"}], rank=1, scale=0.0)
        g = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
        for step_idx in range(num_zeros + 1):
            p.grad = g * (step_idx == num_zeros)
            optimizer.step()
        return float(p.detach().norm())

    # With scale 0 the residual is all of the update. Its first norm is free: not 1e-8.
    assert moved(1) > 0.1 * moved(0) > 0
