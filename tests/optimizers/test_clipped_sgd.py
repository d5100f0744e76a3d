"""ClippedSGD against its mathematics in float64, and what its clips do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_ema_nesterov.optimizers import ClippedSGD, groups_by_role
from tests.optimizers.tiny import TinyLM, random_gradients, state_elements, train
from tests.toys import equal, snapshot

LR, MU, LIMIT, THRESHOLD = 0.05, 0.9, 5e-4, 0.05


def set_gradients(model: TinyLM, step_idx: int) -> list[Tensor]:
    params = [*model.parameters()]
    grads = random_gradients(params, step_idx)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return grads


def test_thirty_steps_match_the_mathematics() -> None:
    model = TinyLM(dtype=torch.float64)
    optimizer = ClippedSGD(groups_by_role(model), lr=LR, update_limit=LIMIT, col_thresh=THRESHOLD)
    names = [name for name, _ in model.named_parameters()]
    w, m = snapshot(model), [torch.zeros_like(p) for p in model.parameters()]
    was_clipped, was_not, rows_clipped = 0, 0, 0
    for t in range(30):
        lr = LR * (1.0 - t / 31)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for idx, g in enumerate(set_gradients(model, t)):
            m[idx] = MU * m[idx] + (1 - MU) * g
            step = m[idx]
            if names[idx] == "lm_head.weight":
                sizes = [float(row.square().sum()) ** 0.5 for row in step]
                step = torch.stack(
                    [row * min(1.0, THRESHOLD / n) for row, n in zip(step, sizes, strict=True)]
                )
                rows_clipped += sum(n > THRESHOLD for n in sizes)
            rms = float(step.square().mean()) ** 0.5
            is_clipped = lr * rms > LIMIT
            was_clipped, was_not = was_clipped + is_clipped, was_not + (not is_clipped)
            w[idx] = w[idx] - lr * step * (LIMIT / (lr * rms) if is_clipped else 1.0)
        optimizer.step()
    for p, expected in zip(model.parameters(), w, strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-9)
    assert min(was_clipped, was_not, rows_clipped) > 10  # each case was there


def test_clips_act_on_the_step_and_never_on_the_momentum() -> None:
    model = TinyLM(dtype=torch.float64)
    optimizer = ClippedSGD(groups_by_role(model), lr=100.0)
    before = snapshot(model)
    grads = set_gradients(model, 0)
    optimizer.step()
    for p, x, g in zip(model.parameters(), before, grads, strict=True):
        rms = (p.detach() - x).square().mean().sqrt()
        assert float(rms) == pytest.approx(5e-4, rel=1e-9)
        buffer = optimizer.state[p]["momentum_buffer"]
        torch.testing.assert_close(buffer, 0.1 * g, rtol=1e-12, atol=0)


def test_rows_of_the_heads_step_are_capped() -> None:
    model = TinyLM(dtype=torch.float64)
    optimizer = ClippedSGD(groups_by_role(model), lr=1.0, update_limit=math.inf)
    before = model.lm_head.weight.detach().clone()
    set_gradients(model, 0)
    optimizer.step()
    norms = (model.lm_head.weight.detach() - before).norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 1e-3), rtol=0, atol=1e-12)


def test_without_limits_it_is_sgd_with_an_averaged_momentum() -> None:
    model, other = TinyLM(dtype=torch.float64), TinyLM(dtype=torch.float64)
    clipped = ClippedSGD(groups_by_role(model), lr=0.1, update_limit=math.inf, col_thresh=math.inf)
    # torch has no damping in the first step of a parameter.
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    m = [torch.zeros_like(p) for p in other.parameters()]
    for t in range(5):
        set_gradients(model, t)
        clipped.step()
        m = [0.9 * a + 0.1 * g for a, g in zip(m, set_gradients(other, t), strict=True)]
        for p, a in zip(other.parameters(), m, strict=True):
            p.grad = a
        sgd.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_state_is_one_number_for_each_parameter() -> None:
    model = TinyLM()
    optimizer = ClippedSGD(groups_by_role(model))
    train(model, optimizer, 2)
    assert all(state_elements(optimizer, p) == p.numel() for p in model.parameters())


def test_no_momentum_keeps_no_state() -> None:
    model = TinyLM()
    optimizer = ClippedSGD(groups_by_role(model), momentum=0.0)
    before = snapshot(model)
    after = train(model, optimizer, 2)
    assert not equal(before, after)
    assert not any(optimizer.state[p] for p in model.parameters())


def test_zero_rate_moves_nothing() -> None:
    model = TinyLM()
    optimizer = ClippedSGD(groups_by_role(model), lr=0.0)
    before = snapshot(model)
    assert equal(train(model, optimizer, 2), before)


@pytest.mark.parametrize("option", ["update_limit", "col_thresh"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_limits_must_be_above_zero(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} must be above 0, got"):
        ClippedSGD(groups_by_role(TinyLM()), **{option: value})
