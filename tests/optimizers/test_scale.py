"""SCALE against its mathematics in float64, and its state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_ema_nesterov.optimizers import SCALE, groups_by_role
from tests.optimizers.tiny import (
    HIDDEN,
    VOCAB,
    WIDTH,
    TinyLM,
    random_gradients,
    state_elements,
    train,
)

LR, ADAM_LR, MU, DECAY = 1e-2, 3e-2, 0.9, 0.1
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class Reference:
    """SCALE, one row and one entry at a time."""

    def __init__(self, model: nn.Module) -> None:
        self.w = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.m = {name: torch.zeros_like(p) for name, p in self.w.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.w.items()}

    def step(self, grads: dict[str, Tensor], t: int, share: float) -> None:
        lr, adam_lr = LR * share, ADAM_LR * share
        for name, g in grads.items():
            w = self.w[name]
            if w.ndim == 1:
                m = self.m[name] = BETA1 * self.m[name] + (1 - BETA1) * g
                v = self.v[name] = BETA2 * self.v[name] + (1 - BETA2) * g * g
                rate = adam_lr * (1 - BETA2**t) ** 0.5 / (1 - BETA1**t)
                self.w[name] = (1 - adam_lr * DECAY) * w - rate * m / (v.sqrt() + EPS)
                continue
            if name == "lm_head.weight":
                g = self.m[name] = MU * self.m[name] + (1 - MU) * g
            rows = g.T if name == "wte.weight" else g
            unit = torch.stack([row / max(float((row * row).mean()) ** 0.5, 1e-8) for row in rows])
            unit = unit.T if name == "wte.weight" else unit
            self.w[name] = (1 - lr * DECAY) * w - lr * unit


def test_thirty_steps_match_the_mathematics() -> None:
    model = TinyLM(dtype=torch.float64)
    reference = Reference(model)
    optimizer = SCALE(groups_by_role(model), lr=LR, adam_lr=ADAM_LR, weight_decay=DECAY)
    params = dict(model.named_parameters())
    for t in range(1, 31):
        share = 1.0 - t / 40
        for group in optimizer.param_groups:
            group["lr"] = LR * share  # a schedule that writes one rate into all groups
        grads = random_gradients([*params.values()], t)
        for p, g in zip(params.values(), grads, strict=True):
            p.grad = g
        optimizer.step()
        reference.step(dict(zip(params, grads, strict=True)), t, share)
    for name, p in params.items():
        torch.testing.assert_close(p.detach(), reference.w[name], rtol=0, atol=1e-9)


def test_state_is_the_heads_momentum_and_the_others_moments() -> None:
    model = TinyLM()
    optimizer = SCALE(groups_by_role(model))
    train(model, optimizer, 2)
    counted = {name: state_elements(optimizer, p) for name, p in model.named_parameters()}
    assert counted == {
        "wte.weight": 0,
        "up.weight": 0,
        "down.weight": 0,
        "lm_head.weight": VOCAB * WIDTH,
        "norm.weight": 2 * WIDTH,
        "norm.bias": 2 * WIDTH,
        "up.bias": 2 * HIDDEN,
    }
    assert optimizer.state[model.up.weight] == {}


def test_update_has_unit_rms_by_output_feature_and_token() -> None:
    model = TinyLM(dtype=torch.float64)
    optimizer = SCALE(groups_by_role(model), lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p, g in zip(model.parameters(), random_gradients([*model.parameters()], 0), strict=True):
        p.grad = g
    optimizer.step()
    for name, dim in (("up.weight", 1), ("wte.weight", 0), ("lm_head.weight", 1)):
        moved = dict(model.named_parameters())[name].detach() - before[name]
        rms = moved.square().mean(dim).sqrt()
        torch.testing.assert_close(rms, torch.ones_like(rms), rtol=0, atol=1e-12)


def test_tied_embedding_has_the_heads_momentum() -> None:
    model = TinyLM()
    model.lm_head.weight = model.wte.weight
    optimizer = SCALE(groups_by_role(model))
    train(model, optimizer, 1)
    assert "momentum_buffer" in optimizer.state[model.wte.weight]


def test_vanishing_rows_are_not_blown_up() -> None:
    model = TinyLM(dtype=torch.float64)
    optimizer = SCALE(groups_by_role(model), lr=1.0)
    before = model.up.weight.detach().clone()
    model.up.weight.grad = torch.full_like(model.up.weight, 1e-12)
    model.up.weight.grad[0] = 0.0
    optimizer.step()
    moved = before - model.up.weight.detach()
    # Below the floor of 1e-8 a row is divided by the floor; the weight itself is rounded to 1e-16.
    torch.testing.assert_close(moved[1:], torch.full_like(moved[1:], 1e-4), rtol=0, atol=1e-15)
    assert torch.equal(moved[0], torch.zeros_like(moved[0]))


def test_rate_of_the_others_defaults_to_lr() -> None:
    groups = SCALE(groups_by_role(TinyLM()), lr=1e-3).param_groups
    assert [g["adam_lr_ratio"] for g in groups] == [1.0] * 4
    groups = SCALE(groups_by_role(TinyLM()), lr=1e-3, adam_lr=2e-2).param_groups
    assert [g["adam_lr_ratio"] for g in groups] == pytest.approx([20.0] * 4)
    assert {g["lr"] for g in groups} == {1e-3}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1.0}, r"lr must be at least 0\.0, got -1\.0"),
        ({"lr": float("nan")}, "lr must be at least"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1\.0"),
        ({"adamw_betas": (0.9, 1.0)}, r"adamw_betas\[1\] must be in"),
        ({"adamw_betas": (0.9,)}, "adamw_betas must be two numbers"),
        ({"adamw_eps": -1e-8}, "adamw_eps must be at least"),
        ({"weight_decay": -0.1}, "weight_decay must be at least"),
        ({"lr": 0.0, "adam_lr": 1.0}, "adam_lr must be at least 0 and lr above 0"),
        ({"adam_lr": -1.0}, "adam_lr must be at least 0"),
    ],
)
def test_values_out_of_range_are_errors(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SCALE(groups_by_role(TinyLM()), **options)  # type: ignore[arg-type]


def test_error_of_a_group_names_it() -> None:
    groups = groups_by_role(TinyLM())
    groups[2]["momentum"] = 1.5
    with pytest.raises(ValueError, match=r"momentum of parameter group 2 \(role 'head'\) must be"):
        SCALE(groups)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_row_without_gradient_stays_in_every_dtype(dtype: torch.dtype) -> None:
    """Vectors are Adam's, whose epsilon is 0 in float16, in torch's Adam too."""
    model = TinyLM().to(dtype)
    optimizer = SCALE(groups_by_role(model), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    for p in matrices.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert len(matrices) > 2
    for name, p in matrices.items():
        assert torch.equal(p, before[name]), name
