"""The function for LitGPT called elsewhere: how it finds the model, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_ema_nesterov.litgpt import ema_nesterov, warmup_stable_decay
from lightning_ema_nesterov.optimizers.from_config import build_optimizer
from tests.litgpt.language import Language, backward, steps
from tests.litgpt.runs import ADAMW, MUON
from tests.toys import equal


def test_a_list_of_parameters_finds_its_model_in_the_first_forward_pass() -> None:
    model, expected = Language(), Language()
    kwargs: dict[str, Any] = {"ema_decay": 0.5, "warmup": 1, "rest": 0}
    outer = nn.Sequential(model)
    optimizer = ema_nesterov(list(model.parameters()), ADAMW, **kwargs)
    reference_optimizer = ema_nesterov(expected.parameters(), ADAMW, **kwargs)
    with torch.no_grad():
        outer(torch.arange(4))  # not training
    treated = steps(expected, reference_optimizer)
    assert equal(steps(outer, optimizer), treated)
    untreated = Language()
    plain = build_optimizer(ADAMW, untreated.parameters(), key="base")
    assert not equal(steps(untreated, plain), treated)


@pytest.mark.parametrize("called", ["another", "a part", "in evaluation"])
def test_a_model_that_cannot_be_found_is_an_error_before_the_first_step(called: str) -> None:
    model = Language()
    optimizer = ema_nesterov(list(model.parameters()), ADAMW, warmup=0, rest=0)
    weight = model.hidden.weight.detach().clone()
    if called == "another":
        loss = nn.Sequential(Language())(torch.arange(4)).sum()
    elif called == "a part":
        loss = model.hidden(torch.ones(4)).sum()
    else:
        loss = model.eval()(torch.arange(4)).sum()
    backward(loss)
    model.hidden.weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match="ema_nesterov found no model that owns the 6 param"):
        optimizer.step()
    assert torch.equal(model.hidden.weight, weight)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("torch.optim.AdamX", "optimizer.init_args.base names torch.optim.AdamX, which cannot"),
        ("no_such_package.AdamW", "which cannot be imported: No module named 'no_such_package'"),
        ("torch.nn.Linear", "base must name a torch.optim.Optimizer, and torch.nn.Linear is"),
        ("builtins.id", "a function that returns one, and builtins.id gives builtins.int"),
        ("math.pi", "optimizer.init_args.base must name an optimizer, and math.pi is not"),
        ({"class_path": "torch.optim.AdamW"}, "optimizer.init_args.base.init_args is missing"),
        ({"init_args": {}}, "optimizer.init_args.base.class_path is missing"),
        ({"class_path": "AdamW", "init_args": {"rate": 1}}, "init_args do not fit AdamW"),
        (3, "optimizer.init_args.base must be a name, or have class_path and init_args, got 3"),
        (
            {"class_path": "AdamW", "init_args": {"lr": -1.0}},
            r"optimizer.init_args.base \(AdamW\) refuses .*: Invalid learning rate: -1.0",
        ),
        (
            {"class_path": "AdamW", "init_args": {"lr": "high"}},
            r"optimizer.init_args.base \(AdamW\) refuses .* 'float' and 'str'",
        ),
        (MUON, r"optimizer.init_args.base \(torch.optim.Muon\) refuses .* only supports 2D"),
    ],
)
def test_a_base_that_is_no_optimizer_is_refused_by_its_key(base: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ema_nesterov(Language().parameters(), base, warmup=0, rest=0)


def test_fused_is_passed_to_those_who_know_it() -> None:
    weight = [nn.Parameter(torch.zeros(2))]
    assert build_optimizer("AdamW", weight, key="base", fused=True).defaults["fused"] is True
    spec = {"class_path": "AdamW", "init_args": {"fused": False}}
    assert build_optimizer(spec, weight, key="base", fused=True).defaults["fused"] is False
    assert "fused" not in build_optimizer("RMSprop", weight, key="base", fused=True).defaults
    model = Language()
    made = ema_nesterov(model.parameters(), ADAMW, warmup=0, rest=0, fused=True)
    assert made.defaults["fused"] is True


def test_a_rest_outside_of_litgpt_needs_the_number_of_steps() -> None:
    with pytest.raises(ValueError, match=r"rest = 150 counts from the end.*total_steps"):
        ema_nesterov(Language().parameters(), ADAMW, warmup=100, rest=150)
    with pytest.raises(RuntimeError, match="replaces the learning rate that litgpt pretrain sets"):
        warmup_stable_decay(Language().parameters(), ADAMW)
