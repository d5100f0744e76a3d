"""One optimizer for the hidden matrices, another for everything else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ema_nesterov.litgpt import by_role, ema_nesterov, roles
from lightning_ema_nesterov.litgpt.roles import set_step_sizes
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.litgpt.language import Language, backward, steps
from tests.litgpt.runs import ADAMW, BY_ROLE, MUON
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


@pytest.mark.parametrize("base", [ADAMW, BY_ROLE], ids=["AdamW", "by role"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_roles_can_have_step_sizes_of_their_own(base: dict[str, Any], is_tied: bool) -> None:
    """The base optimizer takes the same steps; only the points of its gradients move."""
    sizes = {"embedding": 0.0, "head": 0.25}
    options: dict[str, Any] = {"ema_decay": 0.5, "warmup": 0, "rest": 0}
    model, expected = Language(is_tied=is_tied), Language(is_tied=is_tied)
    optimizer = ema_nesterov(model.parameters(), base, lookahead_step_size_by_role=sizes, **options)
    found = {
        p: group.get("lookahead_step_size")
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found[model.lm_head.weight] == 0.25
    assert found[model.embedding.weight] == (0.25 if is_tied else 0.0)
    assert {found[p] for p in (model.hidden.weight, model.hidden.bias, model.norm.weight)} == {None}
    other = ema_nesterov(expected.parameters(), base, **options)
    trained, alike = steps(model, optimizer), steps(expected, other)
    assert torch.equal(trained[-6], alike[-6])  # the first loss
    assert not torch.equal(trained[-1], alike[-1])
    assert all(p in optimizer.state for p in model.parameters())


def test_split_groups_train_as_whole_ones() -> None:
    """Without lookahead the split changes nothing, also with two optimizers in one."""
    whole, split = Language(), Language()
    optimizer = by_role(split.parameters(), MUON, ADAMW)
    set_step_sizes(optimizer, split, {"head": 0.0, "other": 0.1}, argument="x")
    assert len(optimizer.param_groups) == 4
    assert equal(steps(split, optimizer), steps(whole, by_role(whole.parameters(), MUON, ADAMW)))
    again = copy.deepcopy(split)
    other = by_role(again.parameters(), MUON, ADAMW)
    set_step_sizes(other, again, {"head": 0.0, "other": 0.1}, argument="x")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert equal(steps(again, other), steps(split, optimizer))


def test_step_sizes_of_what_is_not_there_are_refused() -> None:
    model = Language(is_tied=True)
    with pytest.raises(ValueError, match=r"by_role must have roles, .* as its keys, got 'tail'"):
        ema_nesterov(model.parameters(), ADAMW, lookahead_step_size_by_role={"tail": 0.0})
    with pytest.raises(ValueError, match="must name a role that parameters have, got embedding;"):
        ema_nesterov(model.parameters(), ADAMW, lookahead_step_size_by_role={"embedding": 0.0})
    with pytest.raises(RuntimeError, match="by_role tells parameters apart by their module"):
        ema_nesterov(list(model.parameters()), ADAMW, lookahead_step_size_by_role={"head": 0.0})
    with pytest.raises(ValueError, match=r"of parameter group 0 must be in \(-1, 1\), got 2.0"):
        ema_nesterov(
            model.parameters(),
            ADAMW,
            lookahead_step_size_by_role={"head": 2.0},
            total_steps=10,
        )
