"""One optimizer for the hidden matrices, another for everything else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_ema_nesterov.litgpt import by_role, ema_nesterov, roles
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.litgpt.language import Language, backward, steps
from tests.litgpt.runs import ADAMW, MUON
from tests.toys import equal


def test_by_role_equals_two_optimizers_at_learning_rates_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(roles, "rank_zero_info", said.append)
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
    [text] = said
    assert "hidden: 1 with 16 elements, Muon" in text


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
