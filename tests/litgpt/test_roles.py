"""One optimizer for the hidden matrices, another for everything else."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from litgpt import GPT, Config
from torch import nn

from lightning_ema_nesterov.litgpt import by_role, ema_nesterov
from lightning_ema_nesterov.litgpt.roles import roles_of
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.litgpt.language import Language, backward, steps
from tests.litgpt.runs import ADAMW, MUON, config_of
from tests.toys import equal


def test_roles_follow_from_modules_and_ties() -> None:
    expected = {
        "embedding": ["embedding.weight"],
        "hidden": ["hidden.weight"],
        "other": ["hidden.bias", "norm.weight", "norm.bias"],
        "head": ["lm_head.weight"],
    }
    model = Language()
    assert names_of(model) == expected
    tied = {"head": ["embedding.weight"], **{key: expected[key] for key in ("hidden", "other")}}
    assert names_of(Language(is_tied=True)) == tied
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    assert names_of(compiled) == expected
    gpt = names_of(GPT(Config(**config_of(Path())["model_config"])))
    assert len(gpt["hidden"]) == 2 * 5  # qkv, proj and three of the MLP
    assert len(gpt["other"]) == 2 * 2 + 1


def names_of(module: nn.Module) -> dict[str, list[str]]:
    return {role: list(params) for role, params in roles_of(module).items()}


def test_by_role_equals_two_optimizers_at_learning_rates_of_their_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="lightning.fabric")
    model, expected = Language(), Language()
    optimizer = by_role(model.parameters(), MUON, ADAMW)
    assert optimizer.defaults["lr"] == 0.02
    hidden = torch.optim.Muon([expected.hidden.weight], lr=0.02, weight_decay=0.0)
    rest = [p for p in expected.parameters() if p is not expected.hidden.weight]
    others = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1)
    ids = torch.arange(8).reshape(2, 4)
    for step_idx in range(6):
        hidden.param_groups[0]["lr"] = 0.02 * (1 - step_idx / 6)
        others.param_groups[0]["lr"] = 0.02 * (1 - step_idx / 6) * 0.5
        backward(nn.functional.cross_entropy(expected(ids).flatten(0, 1), ids.flatten()))
        others.step()
        hidden.step()  # type: ignore[no-untyped-call]  # torch wrote no types for Muon
        expected.zero_grad()
    assert equal(steps(model, optimizer)[:6], [p.detach() for p in expected.parameters()])
    assert caplog.text.count("hidden: 1 with 16 elements, Muon") == 1


@pytest.mark.parametrize("hidden", ["torch.optim.Muon", "pytorch_optimizer.NorMuon"])
def test_by_role_continues_bitwise_from_its_state(hidden: str) -> None:
    spec = {"class_path": hidden, "init_args": {"lr": 0.02}}
    model = Language()
    optimizer = by_role(model.parameters(), spec, ADAMW)
    steps(model, optimizer)
    resumed = copy.deepcopy(model)
    other = by_role(resumed.parameters(), spec, ADAMW)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert equal(steps(resumed, other), steps(model, optimizer))


def test_soap_trains_on_every_parameter() -> None:
    spec = {"class_path": "pytorch_optimizer.SOAP", "init_args": {"lr": 0.01}}
    model = Language()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = ema_nesterov(
        model.parameters(),
        {
            "class_path": "lightning_ema_nesterov.litgpt.by_role",
            "init_args": {"hidden_matrices": spec, "others": spec},
        },
        ema_decay=0.5,
        warmup=0,
        rest=0,
    )
    after = steps(model, optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=False))
    assert "GG" in optimizer.state[model.hidden.weight]
    assert optimizer.state[model.hidden.weight][DIRECTION_KEY].norm() > 0


def test_flat_shards_are_refused_with_the_remedy() -> None:
    model = Language()
    model.hidden.weight = nn.Parameter(model.hidden.weight.detach().flatten())
    with pytest.raises(RuntimeError, match=r"'hidden.weight'\), as FSDP1 makes them.*strategy ddp"):
        by_role(model.parameters(), MUON, ADAMW)
