"""The shipped recipes: each runs two steps of LitGPT's loop, in a small model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from lightning import Fabric
from litgpt import Config, pretrain
from torch import Tensor, nn

from lightning_ema_nesterov.litgpt import StdlibBytes, TextBytes, TokenShards
from lightning_ema_nesterov.low_rank import LowRankLinear
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.litgpt.recipe_files import (
    BY_ROLE,
    EMA_NESTEROV,
    EXPECTED,
    FORMS,
    LOW_RANK,
    RECIPES,
    cases,
    files_of,
    layer,
    layers_of,
    parse,
    read,
)

# What the optimizer of the hidden matrices keeps, and no other optimizer here; SCALE keeps nothing.
STATE_OF: dict[str, str | None] = {
    "lightning_ema_nesterov.optimizers.SCALE": None,
    "lightning_ema_nesterov.optimizers.APOLLO": "seed",
    "torch.optim.AdamW": "exp_avg_sq",
    "torch.optim.Muon": "momentum_buffer",
    "pytorch_optimizer.NorMuon": "second_momentum_buffer",
    "pytorch_optimizer.SOAP": "GG",
}


@dataclass
class Shrunk:
    """A run whose sizes are small, with the optimizer, schedule and precision of the recipe.

    Attributes:
        model: The model at the end.
        before: Its parameters before the first step.
        state: State of the optimizer for each parameter.
        num_steps: Optimizer steps that LitGPT counted.
        lrs: Learning rate in each step.
        step_sizes: Current lookahead step size in each step, 0 where it is not logged.
        losses: Training loss in each step.
    """

    model: nn.Module
    before: dict[str, Tensor]
    state: Mapping[nn.Parameter, Mapping[str, Any]]
    num_steps: int
    lrs: list[float] = field(default_factory=list)
    step_sizes: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


SEQUENCES, LENGTH, NUM_STEPS = 4, 16, 2


def shrunk_optimizer(spec: Any, factor: float) -> Any:
    """Scale the counts of steps; nothing else changes."""
    if not isinstance(spec, Mapping):
        return spec
    return {key: _shrunk(key, value, factor) for key, value in spec.items()}


# Restarts come after the first of two steps, and ranks fit a width of 32.
SMALL = {
    "every_n_steps": 1,
    "recovery_steps": 1,
    "refactorize_every_n_steps": 1,
    "rank": 4,
}


def _shrunk(key: str, value: Any, factor: float) -> Any:
    if key in {"decay", "warmup", "rest"} and isinstance(value, int):
        return round(value * factor)
    return SMALL[key] if key in SMALL else shrunk_optimizer(value, factor)


def shrunk_model(name: str) -> Config:
    small = {
        "block_size": 2 * LENGTH,
        "vocab_size": 256,
        "padded_vocab_size": 256,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "intermediate_size": 48,
    }
    return Config(**{**read(RECIPES / name / "base.yaml")["model_config"], **small})


def write_shard(path: Path, *, seed: int) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 2_000
    tokens = np.random.default_rng(seed).integers(0, 256, 2_000).astype("<u2")
    path.write_bytes(header.tobytes() + tokens.tobytes())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_shard(folder / "train_1.bin", seed=0)
    write_shard(folder / "train_2.bin", seed=1)
    write_shard(folder / "val_1.bin", seed=2)
    (folder / "text.py").write_text("".join(f"x_{i} = {i * i}\n" for i in range(500)))
    return folder


def run_shrunk(parsed: Mapping[str, Any], name: str, text: Path, out_dir: Path) -> Shrunk:
    factor = NUM_STEPS / EXPECTED[name].num_steps
    train = parsed["train"]
    # Accumulation stays accumulation.
    is_accumulating = train.gradient_accumulation_iters(1) > 1
    small = dataclasses.replace(
        train,
        global_batch_size=SEQUENCES,
        micro_batch_size=SEQUENCES // 2 if is_accumulating else SEQUENCES,
        lr_warmup_steps=round(train.lr_warmup_steps * factor),
        max_tokens=NUM_STEPS * SEQUENCES * LENGTH,
        max_seq_length=LENGTH,
        log_interval=1,
    )
    data = (
        TextBytes(path=text / "text.py", cache_dir=text / "bytes")
        if isinstance(parsed["data"], StdlibBytes)
        else TokenShards(train=str(text / "train_*.bin"), val=str(text / "val_*.bin"))
    )
    fabric = Fabric(accelerator="cpu", devices=1, precision=read_precision(name))
    logged: list[dict[str, float]] = []
    vars(fabric)["log_dict"] = lambda metrics, step=None: logged.append(metrics)
    snapshots: list[dict[str, Tensor]] = []
    validate = pretrain.validate

    def validate_and_look(fabric: Fabric, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        snapshots.append({key: p.detach().clone() for key, p in model.named_parameters()})
        loss = validate(fabric, model, *args, **kwargs)
        assert isinstance(loss, Tensor)
        return loss

    with (
        mock.patch.object(torch, "compile", lambda model: model),
        mock.patch.object(pretrain, "save_checkpoint") as save_checkpoint,
        mock.patch.object(pretrain, "validate", validate_and_look),
    ):
        pretrain.main(
            **{
                **parsed,
                "fabric": fabric,
                "devices": 1,
                "config": shrunk_model(name),
                "data": data,
                "out_dir": out_dir,
                "tokenizer": None,
                "tokenizer_dir": None,
                "train": small,
                "eval": dataclasses.replace(parsed["eval"], max_iters=2),
                "optimizer": shrunk_optimizer(parsed["optimizer"], factor),
            }
        )
    _, end, *_ = save_checkpoint.call_args.args
    steps = [metrics for metrics in logged if "learning_rate" in metrics]
    return Shrunk(
        model=end["model"],
        before=snapshots[0],
        state=end["optimizer"].optimizer.state,
        num_steps=end["step_count"],
        lrs=[metrics["learning_rate"] for metrics in steps],
        step_sizes=[metrics.get("ema_nesterov/step_size", 0.0) for metrics in steps],
        losses=[metrics["loss"] for metrics in steps],
    )


def read_precision(name: str) -> Any:
    return read(RECIPES / name / "base.yaml")["precision"]


@pytest.fixture(scope="module")
def run_of(text: Path) -> Callable[[str, str], Shrunk]:
    @cache
    def run(name: str, form: str) -> Shrunk:
        return run_shrunk(parse(*files_of(name, form)), name, text, text / "out" / name / form)

    return run


@pytest.mark.parametrize(("name", "form"), cases(*FORMS))
def test_two_steps_train_every_parameter_with_the_optimizer_of_its_role(
    name: str, form: str, run_of: Callable[[str, str], Shrunk]
) -> None:
    run = run_of(name, form)
    assert run.num_steps == len(run.losses) == NUM_STEPS
    assert np.isfinite(run.losses).all()
    optimizer = parse(*files_of(name, form))["optimizer"]
    specs = {args["class_path"]: args["init_args"] for args in layers_of(optimizer)}
    (plain,) = [path for path in specs if path in STATE_OF] if BY_ROLE not in specs else [""]
    roles = specs.get(BY_ROLE, {})
    hidden = roles["hidden_matrices"]["class_path"] if roles else plain
    others = roles["others"]["class_path"] if roles else plain
    assert run.lrs[0] == specs[hidden]["lr"]
    is_low_rank = any(isinstance(m, LowRankLinear) for m in run.model.modules())
    assert is_low_rank == (LOW_RANK in specs)
    for key, p in run.model.named_parameters():
        assert not torch.equal(p, run.before[key]), key
        is_hidden = ".h." in key and p.ndim == 2
        kept = STATE_OF[hidden if is_hidden else others]
        if not is_hidden and plain.startswith("lightning_ema_nesterov.optimizers."):
            kept = {"SCALE": {"lm_head": "momentum_buffer", "wte": None}}.get(
                plain.rpartition(".")[2], {}
            ).get(key.split(".")[-2], "exp_avg_sq")
        own = {k for k in run.state[p] if not k.startswith("ema_nesterov")}
        assert (kept in own) if kept else not own, key


@pytest.mark.parametrize(("name", "form"), cases(*FORMS))
def test_two_steps_look_ahead_with_the_method_and_not_without(
    name: str, form: str, run_of: Callable[[str, str], Shrunk]
) -> None:
    run = run_of(name, form)
    assert len(run.state) == len(run.before)
    directions = [s[DIRECTION_KEY] for s in run.state.values() if DIRECTION_KEY in s]
    if form != "generic" and form not in EXPECTED[name].baseline_of:
        assert not directions
        assert run.step_sizes == [0.0, 0.0]
        return
    assert len(directions) == len(run.before)
    assert all(direction.norm() > 0 for direction in directions)
    optimizer = parse(*files_of(name, form))["optimizer"]
    beta = layer(optimizer, EMA_NESTEROV)["lookahead_step_size"]
    assert run.step_sizes[1] == pytest.approx(beta * run.lrs[1] / max(run.lrs))
    assert run.step_sizes[1] > 0


def test_shrinking_still_refuses_an_argument_that_an_optimizer_lacks(
    text: Path, tmp_path: Path
) -> None:
    parsed = parse(*files_of("quickstart", "base"))
    spec = yaml.safe_load(yaml.safe_dump(parsed["optimizer"]))
    spec["init_args"]["optimizer"]["init_args"]["learning_rate"] = 1
    with pytest.raises(TypeError, match="learning_rate"):
        run_shrunk({**parsed, "optimizer": spec}, "quickstart", text, tmp_path)
