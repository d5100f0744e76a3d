"""What is measured of a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.core.problem import Attach, direction, start, train
from tests.toys import sgd


def test_metrics_of_a_step_match_the_definition(attach: Attach) -> None:
    params = start(torch.float64)
    lookahead = attach(sgd(params))
    train(lookahead, params, 2)
    x = torch.cat([p.detach().flatten() for p in params])
    m = torch.cat([direction(lookahead, p).flatten() for p in params])
    lookahead.will_measure = True
    train(lookahead, params, 1)
    metrics = lookahead.metrics
    moved = torch.cat([p.detach().flatten() for p in params]) - x
    m_next = torch.cat([direction(lookahead, p).flatten() for p in params])
    assert metrics is not None
    assert metrics.as_scalars() == pytest.approx(
        {
            "ema_nesterov/step_size": 0.5,
            "ema_nesterov/direction_norm": m_next.norm().item(),
            "ema_nesterov/displacement_norm": moved.norm().item(),
            "ema_nesterov/alignment": torch.cosine_similarity(m, moved, dim=0).item(),
        }
    )
    train(lookahead, params, 1)
    assert lookahead.metrics is metrics  # only the step that was asked for


def test_complex_parameters_and_steps_without_any_gradient_are_measured(attach: Attach) -> None:
    p = nn.Parameter(torch.tensor([3.0 + 4.0j]))
    optimizer = torch.optim.SGD([p], lr=0.5)
    lookahead = attach(optimizer)
    lookahead.will_measure = True
    p.grad = torch.tensor([6.0 + 8.0j])
    optimizer.step()
    metrics = lookahead.metrics
    assert metrics is not None
    assert metrics.displacement_norm == pytest.approx(5.0)
    lookahead.will_measure = True
    p.grad = None
    optimizer.step()
    metrics = lookahead.metrics
    assert metrics is not None
    assert metrics.displacement_norm == 0.0
