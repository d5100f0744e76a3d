"""LitGPT's loop takes the steps of the paper's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy
from torch import Tensor
from torch.func import functional_call

from lightning_ema_nesterov.litgpt import TextBytes
from lightning_ema_nesterov.optimizers.lr_schedule import WarmupStableDecay
from lightning_ema_nesterov.optimizers.roles import ROLES
from lightning_ema_nesterov.rules import ema
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.core import reference
from tests.litgpt.runs import (
    ACCUMULATE,
    MICRO_BATCH,
    NUM_STEPS,
    WINDOW,
    Run,
    config_of,
    flat,
    load,
    scalars,
    text_of,
    weights,
    with_lookahead,
)
from tests.toys import equal, relative_error

COMPILE = torch.compile


def cosine(step_idx: float) -> float:
    """LitGPT's learning rate in the last micro-batch of a step, in closed form."""
    it, warmup, end = (step_idx + 1) * ACCUMULATE - 1, 4 * ACCUMULATE, NUM_STEPS * ACCUMULATE
    if it < warmup:
        return 0.01 * it / warmup
    share = (it - warmup) / (end - warmup)
    return 0.001 + 0.5 * (1 + math.cos(math.pi * share)) * (0.01 - 0.001)


def oracle(
    folder: Path,
    x_0: dict[str, Tensor],
    *,
    lr: Callable[[int], float],
    step_size: Callable[[int], float],
) -> list[dict[str, Tensor]]:
    """LitGPT's loop, written down again in float64 around the tests' reference."""
    model = GPT(Config(**config_of(folder)["model_config"])).double()
    batches = list(zip(range(NUM_STEPS * ACCUMULATE), endless(text_of(folder)), strict=False))
    names = [name for name, _ in model.named_parameters()]

    def gradients(params: list[Tensor], step_idx: int) -> list[Tensor]:
        named = dict(zip(names, params, strict=True))
        window = batches[step_idx * ACCUMULATE : (step_idx + 1) * ACCUMULATE]
        with torch.enable_grad():
            losses = [
                chunked_cross_entropy(functional_call(model, named, (b[:, :-1],)), b[:, 1:])
                for _, b in window
            ]
            grads = torch.autograd.grad(torch.stack(losses).mean(), params)
        norm = torch.stack([g.norm() for g in grads]).norm()
        return [g * min(1.0, 1.0 / (float(norm) + 1e-6)) for g in grads]

    trajectory, _ = reference.train(
        [x_0[name] for name in names],
        gradients,
        lambda params: torch.optim.AdamW(params, lr=1.0, weight_decay=0.1),
        make_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lr),
        num_steps=NUM_STEPS,
        ema_decay=0.9,
        step_size=step_size,
    )
    return [dict(zip(names, x, strict=True)) for x in trajectory]


def endless(data: TextBytes) -> Iterator[Tensor]:
    loader = data.train_dataloader()
    while True:
        yield from loader


def initial_weights(folder: Path) -> dict[str, Tensor]:
    """What LitGPT starts from: one step at a learning rate of 0 leaves it."""
    model: dict[str, Tensor] = load(folder / "start/step-00000001")["model"]
    return model


@pytest.mark.parametrize("is_flat", [False, True])
def test_the_run_matches_the_reference_in_float64(
    is_flat: bool, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With LitGPT's cosine, and with a flat learning rate and a compiled model."""
    run(
        out_dir="start",
        optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}},
        train={"save_interval": 1, "min_lr": 0.0, "max_tokens": ACCUMULATE * MICRO_BATCH * WINDOW},
    )
    if is_flat:
        monkeypatch.setattr(torch, "compile", partial(COMPILE, backend="eager"))
    method = with_lookahead(warmup=3, rest=0.2)
    out = run(optimizer=flat(method, decay=0.25) if is_flat else method)

    def lr(t: int) -> float:
        if not is_flat:
            return cosine(t)
        return min(0.01 * (t + 1) / 4, 0.01 if t < 15 else 0.001 + 0.009 * (20 - t) / 5)

    def lr_at_extrapolation(t: int) -> float:  # LitGPT sets another one for each micro-batch
        return lr(t) if is_flat else (cosine(t - 0.5) if t else 0.0)

    trajectory = oracle(
        folder,
        initial_weights(folder),
        lr=lr,
        step_size=lambda t: 0.5 * lr_at_extrapolation(t) / 0.01 if 3 <= t < 16 else 0.0,
    )
    untreated = oracle(folder, initial_weights(folder), lr=lr, step_size=lambda t: 0.0)
    for step in (5, 10, 15, 20):
        x = load(out / f"step-{step:08d}")["model"]
        expected = [trajectory[step][name] for name in x]
        assert relative_error(list(x.values()), expected) < 2e-5  # float32 against float64
    assert relative_error([untreated[-1][name] for name in x], expected) > 1e-2
    steps = dict(enumerate(scalars(out, "ema_nesterov/step_size").values()))
    assert steps == pytest.approx(
        {t: 0.5 * lr_at_extrapolation(t) / 0.01 if 3 <= t < 16 else 0.0 for t in range(20)}
    )


def test_zero_step_size_matches_the_base_optimizer_bitwise(run: Run) -> None:
    plain = run(out_dir="plain")
    run(out_dir="zero", optimizer=with_lookahead(warmup=2, lookahead_step_size=0.0))
    run(out_dir="treated", optimizer=with_lookahead(warmup=2))
    assert equal(weights(plain.parent / "zero/final"), weights(plain / "final"))
    assert not equal(weights(plain.parent / "treated/final"), weights(plain / "final"))


def test_roles_with_a_step_size_of_zero_do_not_look_ahead(run: Run) -> None:
    """All of them are the base optimizer, some of them are neither that nor the default."""
    sizes: dict[str, dict[str, float]] = {
        "all": {},
        "same": {"other": 0.5},  # the default
        "part": {"embedding": 0.0, "head": 0.0},
        "zero": dict.fromkeys(ROLES, 0.0),
    }
    finals = {"plain": weights(run(out_dir="plain") / "final")}
    for name, of_role in sizes.items():
        warns = pytest.warns(UserWarning, match="never looks ahead")
        with warns if name == "zero" else nullcontext():
            optimizer = with_lookahead(warmup=2, lookahead_step_size_by_role=of_role)
            finals[name] = weights(run(out_dir=name, optimizer=optimizer) / "final")
    assert equal(finals["zero"], finals["plain"])
    # The parts are groups of their own, and Fabric sums the norm of gradients in their order.
    assert relative_error(finals["same"], finals["all"]) < 1e-5
    for other in ("plain", "all"):
        assert relative_error(finals["part"], finals[other]) > 1e-3


@pytest.mark.slow
def test_forms_that_cost_less_train_and_save_alike(run: Run) -> None:
    """In LitGPT's loop the end of an update waits; bfloat16 and int8 round."""
    outs = {
        "plain": run(out_dir="plain", optimizer=with_lookahead(lookahead_step_size=0.0, rest=0))
    }
    forms: dict[str, dict[str, Any]] = {
        "default": {},
        "compile": {"compile": True},
        "bfloat16": {"direction_dtype": "bfloat16"},
    }
    for name, kwargs in forms.items():
        outs[name] = run(out_dir=name, optimizer=with_lookahead(rest=0, **kwargs))
    finals = {name: load(out / "final") for name, out in outs.items()}

    def tensors(name: str) -> list[Tensor]:
        states = finals[name]["optimizer"]["state"].values()
        return [*finals[name]["model"].values(), *(state[DIRECTION_KEY] for state in states)]

    # Another order of rounding. A fold in place of a direction would be off by its size.
    assert relative_error(tensors("compile"), tensors("default")) < 1e-4
    m = [
        [state[DIRECTION_KEY] for state in finals[name]["optimizer"]["state"].values()]
        for name in ("compile", "default")
    ]
    assert relative_error(*m) < 1e-2
    # The rounding of 8 bits.
    assert 0 < relative_error(tensors("bfloat16"), tensors("default")) < 1e-2
    assert relative_error(tensors("plain"), tensors("default")) > 3e-2


def test_scalars_are_logged_beside_the_loss_and_only_measured_there(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = 0
    sums_of_step = vars(ema)["sums_of_step"]

    def count(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal measured
        measured += 1
        sums: Tensor = sums_of_step(*args, **kwargs)
        return sums

    monkeypatch.setattr(ema, "sums_of_step", count)
    out = run(optimizer=flat(with_lookahead()), train={"log_interval": 5})
    loss = scalars(out, "loss")
    assert list(loss) == [9, 19, 29, 39]  # micro-batches, from 0
    for name in ("step_size", "direction_norm", "displacement_norm", "alignment"):
        logged = scalars(out, f"ema_nesterov/{name}")
        assert list(logged) == list(loss)
        # The first of these steps is in the warmup, the last one without lookahead again.
        assert all(value != 0 for value in list(logged.values())[1:3])
    assert measured == 4
    schedule = WarmupStableDecay(0.01, 0.001, warmup_steps=4, decay_steps=4, total_steps=20)
    logged = scalars(out, "learning_rate")
    assert logged == pytest.approx({x: schedule.lr_at((x + 1) // 2 - 1) for x in loss})
    assert list(scalars(out, "val_loss")) == [9, 19, 29, 39, 40]
