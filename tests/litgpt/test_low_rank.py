"""Low-rank models, restarts and lean optimizers, named in the optimizer block of LitGPT's YAML."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_ema_nesterov.litgpt import by_role, ema_nesterov, low_rank, momentum_reset
from lightning_ema_nesterov.low_rank import LowRankLinear
from lightning_ema_nesterov.optimizers import SCALE, groups_by_role
from lightning_ema_nesterov.optimizers.from_config import build_optimizer
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.litgpt.language import Language, steps
from tests.litgpt.runs import (
    ADAMW,
    BY_ROLE,
    Run,
    flat,
    load,
    pretrain_on_two,
    weights,
    with_lookahead,
    write_config,
)
from tests.toys import equal

OURS = "lightning_ema_nesterov.litgpt"
LEAN: dict[str, dict[str, Any]] = {
    "SCALE": {"lr": 0.01},
    "ClippedSGD": {"lr": 10.0},
    "GaLore": {"rank": 2, "update_proj_gap": 3},
    "Fira": {"rank": 2, "update_proj_gap": 3},
    "APOLLO": {"rank": 2, "update_proj_gap": 3},
    "LoRAPre": {"lr": 0.01, "rank": 2},
}


def lean(name: str) -> dict[str, Any]:
    return {"class_path": f"lightning_ema_nesterov.optimizers.{name}", "init_args": LEAN[name]}


def reset(optimizer: Any, **kwargs: Any) -> dict[str, Any]:
    return {"class_path": f"{OURS}.momentum_reset", "init_args": {"optimizer": optimizer, **kwargs}}


def thin(trained_by: Any, **kwargs: Any) -> dict[str, Any]:
    init_args = {"rank": 3, "trained_by": trained_by, **kwargs}
    return {"class_path": f"{OURS}.low_rank", "init_args": init_args}


RESTARTED = thin(
    flat(with_lookahead(reset(ADAMW, every_n_steps=6, recovery_steps=3), warmup=3), decay=0.25),
    sparsity=0.1,
    refactorize_every_n_steps=6,
)


@pytest.mark.parametrize("name", LEAN)
def test_lean_optimizer_in_another_function_finds_the_roles(name: str) -> None:
    model, expected = Language(), Language()
    options: Any = {"lookahead_step_size": 0.0, "warmup": 0, "rest": 0}
    optimizer = ema_nesterov(model.parameters(), lean(name), **options)
    assert [group["role"] for group in optimizer.param_groups] == [
        "hidden",
        "embedding",
        "head",
        "other",
    ]
    plain = type(optimizer)(groups_by_role(expected), **LEAN[name])
    assert equal(steps(model, optimizer), steps(expected, plain))
    assert DIRECTION_KEY in optimizer.state[model.hidden.weight]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "SCALE" else [pytest.mark.slow]) for n in LEAN]
)
@pytest.mark.parametrize("place", ["alone", "in all"])
def test_litgpt_trains_with_a_lean_optimizer(name: str, place: str, run: Run) -> None:
    optimizer = lean(name) if place == "alone" else flat(with_lookahead(lean(name)))
    checkpoint = load(run(optimizer=optimizer) / "final")
    roles = [group["role"] for group in checkpoint["optimizer"]["param_groups"]]
    assert roles == ["hidden", "embedding", "head", "other"]
    states = checkpoint["optimizer"]["state"].values()
    assert all(DIRECTION_KEY in state for state in states) == (place == "in all")


def test_without_a_yaml_roles_have_to_be_given() -> None:
    with pytest.raises(ValueError, match="must have a role"):
        SCALE(Language().parameters())
    with pytest.raises(ValueError, match="must have a role"):  # a list tells no module
        build_optimizer(lean("SCALE"), list(Language().parameters()), key="base")


def test_model_whose_head_is_not_found_is_one_error() -> None:
    model = Language()
    model.lm_head = nn.Linear(4, 5, bias=False)  # as many outputs as no embedding has rows
    model.last = model.lm_head
    del model.lm_head
    with pytest.raises(ValueError, match=r"The head must be one linear layer .* Pass roles="):
        ema_nesterov(model.parameters(), lean("SCALE"))


def test_low_rank_changes_the_model_and_looks_ahead() -> None:
    model = Language()
    optimizer = low_rank(
        model.parameters(),
        2,
        with_lookahead(reset(ADAMW, every_n_steps=3, recovery_steps=1), warmup=0, rest=0),
        refactorize_every_n_steps=3,
    )
    layer: Any = model.hidden
    assert isinstance(layer, LowRankLinear)
    assert layer.rank == 2
    assert set(model.parameters()) == {p for g in optimizer.param_groups for p in g["params"]}
    before = [p.detach().clone() for p in model.parameters()]
    steps(model, optimizer, 6)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    # It was the end of step 6.
    torch.testing.assert_close(layer.B.mT @ layer.B, layer.A @ layer.A.mT, rtol=1e-4, atol=1e-5)
    assert optimizer.state[layer.B][DIRECTION_KEY].norm() > 0


def test_litgpt_run_continues_bitwise_through_restarts(run: Run, folder: Path) -> None:
    whole = run(optimizer=RESTARTED)
    path = whole / "step-00000005/lit_model.pth"
    resumed = run(out_dir="resumed", optimizer=RESTARTED, resume=path)
    assert equal(weights(resumed / "final"), weights(whole / "final"))
    assert any(name.endswith(".sparse_values") for name in load(whole / "final")["model"])
    other = copy.deepcopy(RESTARTED)
    del other["init_args"]["refactorize_every_n_steps"]
    plain = run(out_dir="plain", optimizer=other)
    assert not equal(weights(plain / "final"), weights(whole / "final"))


@pytest.mark.slow
def test_two_processes_equal_one_bitwise(run: Run, folder: Path) -> None:
    """The launcher makes the layers before DDP wraps the model; LitGPT alone cannot."""
    one = run(out_dir="one", optimizer=RESTARTED)
    write_config(folder, optimizer=RESTARTED)
    arguments = ("--config", "config.yaml", "--out_dir", "two")
    options = ("--strategy", "ddp", "--train.save_interval", "20")
    pretrain_on_two(*arguments, *options, folder=folder)
    # Two halves of a batch have one sum, and both processes decompose the same factors.
    assert equal(weights(folder / "two/final"), weights(one / "final"))
    plain = run(out_dir="plain", optimizer=thin(flat(with_lookahead(ADAMW)), sparsity=0.1))
    assert not equal(weights(plain / "final"), weights(one / "final"))


class Wrapped(DistributedDataParallel):
    """What DDP is to those who ask, without processes."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


def test_model_that_is_wrapped_is_refused_with_the_remedy() -> None:
    model = Language()
    with pytest.raises(RuntimeError, match=r"wrapped it. Train with `ema-nesterov pretrain --str"):
        low_rank(Wrapped(model).parameters(), 2, ADAMW)
    assert type(model.hidden) is nn.Linear
    with pytest.raises(RuntimeError, match=r"cannot find it. Give it model.parameters"):
        low_rank(list(model.parameters()), 2, ADAMW)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: low_rank(p, 5, ADAMW), r"'hidden': rank must be .* 4 for \(4, 4\), got 5"),
        (lambda p: low_rank(p, 2, thin(ADAMW)), "trained_by names low_rank, which must be the o"),
        (lambda p: low_rank(p, 2, ADAMW, refactorize_every_n_steps=0), "refactorize_every_n_steps"),
        (lambda p: momentum_reset(p, ADAMW, 5, 6), "recovery_steps must be at most every_n_steps"),
        (lambda p: by_role(p, reset(ADAMW), ADAMW), "hidden_matrices names momentum_reset, which"),
        (lambda p: by_role(p, ADAMW, reset(ADAMW)), "others names momentum_reset, which must"),
        (
            lambda p: ema_nesterov(p, thin(ADAMW)),
            "base names low_rank, which must be the ou",
        ),
    ],
)
def test_what_cannot_work_is_one_error(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(Language().parameters())


def test_momentum_reset_stands_around_by_role() -> None:
    model = Language()
    optimizer = momentum_reset(model.parameters(), BY_ROLE, every_n_steps=3, recovery_steps=2)
    twin = Language()
    plain = build_optimizer(BY_ROLE, twin.parameters(), key="base")
    assert equal(steps(model, optimizer, 3)[:6], steps(twin, plain, 3)[:6])
    steps(model, optimizer, 3)
    steps(twin, plain, 3)
    assert not equal([*model.parameters()], [*twin.parameters()])
