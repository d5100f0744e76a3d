"""LitGPT: the method, the optimizers and the schedule that a YAML names, in its own loop."""

from __future__ import annotations

import copy
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import litgpt.__main__
import numpy as np
import pytest
import torch
import yaml
from litgpt import GPT, Config, pretrain
from litgpt.utils import CLI, chunked_cross_entropy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.func import functional_call

from lightning_ema_nesterov.litgpt import TextBytes, by_role, ema_nesterov, warmup_stable_decay
from lightning_ema_nesterov.litgpt.roles import roles_of
from lightning_ema_nesterov.optimizers.from_config import build_optimizer
from lightning_ema_nesterov.optimizers.lr_schedule import WarmupStableDecay
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.core import reference
from tests.toys import equal, relative_error

Run = Callable[..., Path]

ACCUMULATE, MICRO_BATCH, WINDOW, NUM_STEPS = 2, 4, 16, 20
TWO_FILES = ("--config", "config.yaml", "--config", "ema_nesterov.yaml")
COMPILE = torch.compile
MODULES = {"litgpt": "litgpt", "ema-nesterov": "lightning_ema_nesterov.cli"}
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.1}}
MUON = {"class_path": "torch.optim.Muon", "init_args": {"lr": 0.02, "weight_decay": 0.0}}
BY_ROLE = {
    "class_path": "lightning_ema_nesterov.litgpt.by_role",
    "init_args": {"hidden_matrices": MUON, "others": ADAMW},
}


def with_lookahead(base: dict[str, Any] = ADAMW, **kwargs: Any) -> dict[str, Any]:
    init_args = {"base": base, "ema_decay": 0.9, **kwargs}
    return {"class_path": "lightning_ema_nesterov.litgpt.ema_nesterov", "init_args": init_args}


def flat(optimizer: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    init_args = {"optimizer": optimizer, **kwargs}
    path = "lightning_ema_nesterov.litgpt.warmup_stable_decay"
    return {"class_path": path, "init_args": init_args}


def config_of(folder: Path) -> dict[str, Any]:
    """A run of 20 steps with two micro-batches in each."""
    return {
        "model_name": "tiny",
        "model_config": {
            "name": "tiny",
            "block_size": WINDOW,
            "vocab_size": 256,
            "padded_vocab_size": 256,
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 16,
            "intermediate_size": 32,
            "rotary_percentage": 1.0,
            "parallel_residual": False,
            "bias": False,
            "norm_class_name": "RMSNorm",
            "mlp_class_name": "LLaMAMLP",
        },
        "out_dir": "out",
        "precision": "32-true",
        "data": {
            "class_path": "lightning_ema_nesterov.litgpt.TextBytes",
            "init_args": {"path": str(folder / "text")},
        },
        "train": {
            "save_interval": 5,
            "log_interval": 1,
            "global_batch_size": ACCUMULATE * MICRO_BATCH,
            "micro_batch_size": MICRO_BATCH,
            "lr_warmup_steps": 4,
            "max_tokens": NUM_STEPS * ACCUMULATE * MICRO_BATCH * WINDOW,
            "max_norm": 1.0,
            "min_lr": 0.001,
        },
        "eval": {"interval": 5, "max_iters": 3, "final_validation": True},
        "optimizer": ADAMW,
        "devices": 1,
    }


def write_text(folder: Path) -> Path:
    text = folder / "text"
    text.mkdir()
    for idx in range(20):
        (text / f"{idx}.txt").write_text(f"chapter {idx}: the quick brown fox jumps. " * 20)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_text(tmp_path)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run by the stock command, from a base file and an overlay, in ``whole``."""
    folder = write_text(tmp_path_factory.mktemp("stock"))
    write_config(folder)
    optimizer = flat(with_lookahead(BY_ROLE, warmup=3), decay=0.25)
    (folder / "ema_nesterov.yaml").write_text(yaml.safe_dump({"optimizer": optimizer}))
    finish(start(*TWO_FILES, "--out_dir", "whole", folder=folder))
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of litgpt_sharded.py."""
    folder = write_text(tmp_path_factory.mktemp("sharded"))
    for name, optimizer in (
        ("adamw", with_lookahead(warmup=2)),
        ("muon", flat(with_lookahead(BY_ROLE))),
    ):
        write_config(folder, optimizer=optimizer, devices=2).rename(folder / f"{name}.yaml")
    worker = Path(__file__).parent / "litgpt_sharded.py"
    endpoint = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *endpoint]
    finish(start_process([*launch, str(worker)], folder))
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Train in this process with LitGPT's own command line, and return ``out_dir``."""
    monkeypatch.setattr(torch, "compile", lambda module: module)
    # It parses the command line again, half a second for each checkpoint.
    monkeypatch.setattr(pretrain, "save_hyperparameters", lambda *args: None)
    monkeypatch.chdir(folder)

    def call(*arguments: str, out_dir: str = "out", **changes: Any) -> Path:
        path = write_config(folder, out_dir=out_dir, **changes)
        monkeypatch.setattr(sys, "argv", ["litgpt", "--config", str(path), *arguments])
        CLI(pretrain.setup)
        return folder / out_dir

    return call


def write_config(folder: Path, **changes: Any) -> Path:
    config = config_of(folder)
    for key, value in changes.items():
        is_block = isinstance(value, dict) and key in ("train", "eval", "model_config")
        config[key] = {**config[key], **value} if is_block else value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(*arguments: str, folder: Path, program: str = "litgpt") -> subprocess.Popen[str]:
    """The stock command in a process of its own, without a compiler."""
    return start_process([sys.executable, "-m", MODULES[program], "pretrain", *arguments], folder)


def start_process(command: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, output[-3000:]
    return output


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path / "lit_model.pth", weights_only=True)
    return loaded


def weights(path: Path) -> list[Tensor]:
    model = load(path)["model"]
    return [model[name] for name in sorted(model)]


def scalars(out_dir: Path, tag: str) -> dict[int, float]:
    """What was logged in all runs of a folder, by its place on the x axis."""
    found: dict[int, float] = {}
    for folder in sorted((out_dir / "logs" / "tensorboard").iterdir()):
        accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        accumulator.Reload()
        if tag in accumulator.Tags()["scalars"]:
            found |= {event.step: event.value for event in accumulator.Scalars(tag)}
    return found


def loss_at(tensors: dict[str, Tensor], folder: Path) -> float:
    """LitGPT's validation loss of a state dict."""
    model = GPT(Config(**config_of(folder)["model_config"]))
    model.load_state_dict(tensors)
    data = text_of(folder)
    losses = []
    with torch.no_grad():
        for _, batch in zip(range(3), data.val_dataloader(), strict=False):
            losses.append(chunked_cross_entropy(model(batch[:, :-1]), batch[:, 1:]))
    return float(torch.stack(losses).mean())


def text_of(folder: Path) -> TextBytes:
    data = TextBytes(path=folder / "text", cache_dir=folder / "data/bytes")
    data.connect(batch_size=MICRO_BATCH, max_seq_length=WINDOW)
    data.prepare_data()
    data.setup()
    return data


def cosine(step_idx: int) -> float:
    """LitGPT's learning rate in the last micro-batch of a step, in closed form."""
    it, warmup, end = (step_idx + 1) * ACCUMULATE - 1, 4 * ACCUMULATE, NUM_STEPS * ACCUMULATE
    if it < warmup:
        return 0.01 * it / warmup
    share = (it - warmup) / (end - warmup)
    return 0.001 + 0.5 * (1 + math.cos(math.pi * share)) * (0.01 - 0.001)


def test_validation_and_checkpoints_of_the_stock_command_hold_the_iterate(stock: Path) -> None:
    logged = scalars(stock / "whole", "val_loss")
    gpt = GPT(Config(**config_of(stock)["model_config"]))
    names = [name for name, _ in gpt.named_parameters()]
    hidden = [name for p, (role, name) in roles_of(gpt).items() if role == "hidden matrix"]
    in_order = [*hidden, *(name for name in names if name not in hidden)]
    for step in (5, 10, 15, 20):
        checkpoint = load(stock / "whole" / f"step-{step:08d}")
        model, optimizer = checkpoint["model"], checkpoint["optimizer"]
        # Bit for bit: what TensorBoard holds is a float32.
        assert logged[step * ACCUMULATE - 1] == loss_at(model, stock)
        if step > 18:  # in the rest there is none
            assert not any(DIRECTION_KEY in state for state in optimizer["state"].values())
            continue
        m = [state[DIRECTION_KEY] for state in optimizer["state"].values()]
        y = {name: model[name] + 0.5 * m_i for name, m_i in zip(in_order, m, strict=True)}
        assert abs(loss_at({**model, **y}, stock) - loss_at(model, stock)) > 1e-3
    assert equal(weights(stock / "whole/final"), weights(stock / "whole/step-00000020"))


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
    for name, kwargs in (("zero", {"lookahead_step_size": 0.0}), ("treated", {})):
        run(out_dir=name, optimizer=with_lookahead(warmup=2, **kwargs))
    assert equal(weights(plain.parent / "zero/final"), weights(plain / "final"))
    assert not equal(weights(plain.parent / "treated/final"), weights(plain / "final"))


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
    import lightning_ema_nesterov.rules.ema as direction

    measured = 0
    sums_of_step = direction.sums_of_step

    def count(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal measured
        measured += 1
        return sums_of_step(*args, **kwargs)

    monkeypatch.setattr(direction, "sums_of_step", count)
    out = run(optimizer=flat(with_lookahead()), train={"log_interval": 5})
    loss = scalars(out, "loss")
    assert list(loss) == [9, 19, 29, 39]  # micro-batches, from 0
    for name in ("step_size", "direction_norm", "displacement_norm", "alignment"):
        logged = scalars(out, f"ema_nesterov/{name}")
        # Steps 5, 10, 15 and, in the rest, 20.
        assert list(logged) == list(loss)[: 4 if name == "step_size" else 3]
        assert all(map(math.isfinite, logged.values()))
    assert measured == 3
    schedule = WarmupStableDecay(0.01, 0.001, warmup_steps=4, decay_steps=4, total_steps=20)
    logged = scalars(out, "learning_rate")
    assert logged == pytest.approx({x: schedule.lr_at((x + 1) // 2 - 1) for x in loss})
    assert list(scalars(out, "val_loss")) == [9, 19, 29, 39, 40]


def test_a_checkpoint_without_the_method_continues_with_it(run: Run) -> None:
    plain = run(train={"max_tokens": 10 * ACCUMULATE * MICRO_BATCH * WINDOW})
    resumed = run(
        "--resume", "auto", optimizer=with_lookahead(warmup=0, rest=4, scale_with_lr=False)
    )
    assert resumed == plain
    step_sizes = scalars(plain, "ema_nesterov/step_size")
    # The clock is LitGPT's: 10 steps without, then one with m = 0, 5 with lookahead, 4 of rest.
    assert list(step_sizes.values()) == [0.0] + [0.5] * 5 + [0.0] * 4
    norms = scalars(plain, "ema_nesterov/direction_norm")
    assert len(norms) == 6  # the rest has no direction
    assert min(norms.values()) > 0


def test_killed_run_continues_bitwise(stock: Path) -> None:
    arguments = (*TWO_FILES, "--out_dir", "cut")
    killed = start(*arguments, folder=stock)
    assert killed.stdout is not None
    for line in killed.stdout:
        if "step 13 " in line:  # between two checkpoints
            os.kill(killed.pid, signal.SIGKILL)
            break
    killed.wait()
    assert not (stock / "cut/final").exists()
    assert "Resuming training from" in finish(start(*arguments, "--resume", "auto", folder=stock))
    assert equal(weights(stock / "cut/final"), weights(stock / "whole/final"))
    for tag in ("loss", "val_loss", "ema_nesterov/direction_norm"):
        assert scalars(stock / "cut", tag) == scalars(stock / "whole", tag)


def test_two_processes_equal_one(run: Run, folder: Path) -> None:
    """DDP through the launcher, with Muon, which LitGPT's own FSDP1 cannot run."""
    one = run(out_dir="one", optimizer=flat(with_lookahead(BY_ROLE)))
    arguments = ("--config", "config.yaml", "--devices", "2", "--out_dir", "two")
    options = ("--strategy", "ddp", "--train.save_interval", "20")
    finish(start(*arguments, *options, folder=folder, program="ema-nesterov"))
    # Muon orthogonalises in bfloat16.
    assert relative_error(weights(folder / "two/final"), weights(one / "final")) < 1e-4
    losses, expected = (scalars(out, "val_loss") for out in (folder / "two", one))
    assert list(losses.values()) == pytest.approx(list(expected.values()), abs=1e-5)


def test_fsdp2_run_continues_bitwise(sharded: Path) -> None:
    losses = scalars(sharded / "whole", "val_loss")
    assert losses[20] < losses[4] - 1
    checkpoint = load(sharded / "whole/step-00000010")
    shapes = [p.shape for p in checkpoint["model"].values()]
    gpt = GPT(Config(**config_of(sharded)["model_config"]))
    assert shapes == [p.shape for p in gpt.state_dict().values()]
    for state in checkpoint["optimizer"]["state"].values():
        assert state[DIRECTION_KEY].norm() > 0
    assert equal(weights(sharded / "continued/final"), weights(sharded / "whole/final"))
    after_ten_steps = {x: loss for x, loss in losses.items() if x >= 10}
    assert list(after_ten_steps) == [14, 19, 20]  # two processes: one micro-batch in each step
    assert scalars(sharded / "continued", "val_loss") == after_ten_steps


def test_fsdp1_validates_without_a_trace_and_refuses_muon(sharded: Path) -> None:
    """Validation gathers the iterate: training must not go on with what it gathered."""
    quiet, watched = (sharded / f"{name}_validation" for name in ("without", "with"))
    assert len(scalars(watched, "val_loss")) == NUM_STEPS + 1
    assert scalars(watched, "loss") == scalars(quiet, "loss")
    sizes = scalars(watched, "ema_nesterov/step_size")
    assert sum(value > 0 for value in sizes.values()) == 15
    for rank in range(2):
        assert "as FSDP1 makes them" in (sharded / f"refusal_{rank}.txt").read_text()


def test_litgpt_converts_and_generates_from_a_checkpoint(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Path(__file__).parents[2] / "recipes/byte_tokenizer"
    out = run("--tokenizer_dir", str(tokenizer), optimizer=with_lookahead())
    convert = ["convert_pretrained_checkpoint", str(out / "final"), str(folder / "converted")]
    generate = ["generate", str(folder / "converted"), "--prompt", "the ", "--max_new_tokens", "8"]
    for arguments in (convert, [*generate, "--precision", "32-true"]):
        monkeypatch.setattr(sys, "argv", ["litgpt", *arguments])
        litgpt.__main__.main()
    converted = torch.load(folder / "converted/lit_model.pth", weights_only=True)
    assert equal([converted[name] for name in sorted(converted)], weights(out / "final"))
    assert capsys.readouterr().out.splitlines()[-1].startswith("the ")


class Language(nn.Module):
    """A model with a head that can be tied, called in a loop without LitGPT."""

    def __init__(self, *, is_tied: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(8, 4)
        self.hidden = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 8, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        if is_tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.norm(self.hidden(self.embedding(ids))))
        return logits


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int = 6) -> list[Tensor]:
    """Train, and return the weights and the loss of each forward pass."""
    ids = torch.arange(8).reshape(2, 4)
    losses = []
    for step_idx in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * (1 - step_idx / num_steps)
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*(p.detach().clone() for p in model.parameters()), *losses]


def test_roles_follow_from_modules_and_ties() -> None:
    expected = ["embedding", "hidden matrix", "vector", "vector", "vector", "head"]
    assert [role for role, _ in roles_of(Language()).values()] == expected
    tied = roles_of(Language(is_tied=True))
    assert [role for role, _ in tied.values()] == ["tied embedding", *expected[1:-1]]
    wrapped = torch.compile(nn.Sequential(nn.Sequential(Language())), backend="eager")
    assert [role for role, _ in roles_of(wrapped).values()] == expected
    gpt = GPT(Config(**config_of(Path())["model_config"]))
    counts = [role for role, _ in roles_of(gpt).values()]
    assert counts.count("hidden matrix") == 2 * 5  # qkv, proj and three of the MLP
    assert counts.count("vector") == 2 * 2 + 1


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
        nn.functional.cross_entropy(expected(ids).flatten(0, 1), ids.flatten()).backward()
        for each in (hidden, others):
            each.step()
            each.zero_grad()
    assert equal(steps(model, optimizer)[:6], [p.detach() for p in expected.parameters()])
    assert caplog.text.count("hidden matrix: 1 with 16 elements, Muon") == 1


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
    plain = build_optimizer(ADAMW, untreated.parameters(), argument="base")
    assert not equal(steps(untreated, plain), treated)


def test_a_model_that_cannot_be_found_is_an_error_before_the_first_step() -> None:
    model = Language()
    optimizer = ema_nesterov(list(model.parameters()), ADAMW, warmup=0, rest=0)
    weight = model.hidden.weight.detach().clone()
    loss = functional_call(nn.Sequential(Language()), {}, (torch.arange(4),)).sum()
    model.hidden.weight.grad = torch.ones_like(model.hidden.weight)
    with pytest.raises(RuntimeError, match="ema_nesterov found no model that owns"):
        optimizer.step()
    assert torch.equal(model.hidden.weight, weight)
    assert loss.isfinite()


def test_flat_shards_are_refused_with_the_remedy() -> None:
    model = Language()
    model.hidden.weight = nn.Parameter(model.hidden.weight.detach().flatten())
    with pytest.raises(RuntimeError, match=r"'hidden.weight'\), as FSDP1 makes them.*strategy ddp"):
        by_role(model.parameters(), MUON, ADAMW)


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
    assert build_optimizer("AdamW", weight, argument="base", fused=True).defaults["fused"] is True
    spec = {"class_path": "AdamW", "init_args": {"fused": False}}
    assert build_optimizer(spec, weight, argument="base", fused=True).defaults["fused"] is False
    assert "fused" not in build_optimizer("RMSprop", weight, argument="base", fused=True).defaults
    model = Language()
    made = ema_nesterov(model.parameters(), ADAMW, warmup=0, rest=0, fused=True)
    assert made.defaults["fused"] is True


@pytest.mark.parametrize(
    ("optimizer", "train", "message"),
    [
        (with_lookahead(total_steps=30), {}, "total_steps is 30, and train.max_tokens = 2560"),
        (
            flat(with_lookahead({**BY_ROLE, "init_args": {"hidden_matrices": MUON, "others": 3}})),
            {},
            "optimizer.init_args.optimizer.init_args.base.init_args.others must be a name",
        ),
        (with_lookahead(flat(ADAMW)), {}, "init_args.base names warmup_stable_decay, which must"),
        (with_lookahead(with_lookahead()), {}, "init_args.base names ema_nesterov, which must"),
        (
            {**BY_ROLE, "init_args": {"hidden_matrices": with_lookahead(MUON), "others": ADAMW}},
            {},
            "init_args.hidden_matrices names ema_nesterov, which must be",
        ),
        (with_lookahead(), {"max_tokens": 100}, "train.max_tokens must allow one optimizer step"),
        (flat(ADAMW, decay="0.3 "), {}, "optimizer.init_args.decay must be a number of steps"),
        (flat(ADAMW, decay=1.5), {}, r"decay must be in \[0, 1\] as a fraction"),
        (with_lookahead(warmup=15, rest=10), {}, "warmup \\+ rest must not be longer"),
        (with_lookahead(lookahead_step_size=1.5), {}, "lookahead_step_size must be in"),
        (flat(ADAMW, decay=18), {}, "train.lr_warmup_steps \\+ decay must not be longer"),
        (flat(ADAMW), {"min_lr": 0.1}, "train.min_lr must be in"),
        (flat(ADAMW, shape="exponential"), {"min_lr": 0.0}, "train.min_lr must be above 0"),
        (flat(ADAMW, shape="step"), {}, "shape must be linear or exponential"),
        (
            flat(ADAMW),
            {"lr_warmup_steps": None, "lr_warmup_fraction": 0.1},
            "Set train.lr_warmup_steps",
        ),
    ],
)
def test_what_contradicts_the_run_is_refused_before_the_first_step(
    optimizer: dict[str, Any], train: dict[str, Any], message: str, run: Run, folder: Path
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        run(optimizer=optimizer, train=train)
    assert not list(folder.rglob("*.pth"))


def test_tokens_that_the_model_does_not_have_are_refused(run: Run, folder: Path) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, 200
    for largest in (255, 256):
        tokens = np.full(200, largest, dtype="<u2")
        (folder / f"{largest}.bin").write_bytes(header.tobytes() + tokens.tobytes())
    path = "lightning_ema_nesterov.litgpt.TokenShards"
    one_step = {"max_tokens": ACCUMULATE * MICRO_BATCH * WINDOW, "lr_warmup_steps": 0}
    run(
        data={"class_path": path, "init_args": {"train": "255.bin", "val": "255.bin"}},
        train=one_step,
    )
    with pytest.raises(
        ValueError, match=r"data.init_args.val: 256.bin holds the token id 256, and"
    ):
        run(data={"class_path": path, "init_args": {"train": "255.bin", "val": "256.bin"}})


def test_a_rest_outside_of_litgpt_needs_the_number_of_steps() -> None:
    with pytest.raises(ValueError, match=r"rest = 150 counts from the end.*total_steps"):
        ema_nesterov(Language().parameters(), ADAMW, warmup=100, rest=150)
    with pytest.raises(RuntimeError, match="replaces the learning rate that litgpt pretrain sets"):
        warmup_stable_decay(Language().parameters(), ADAMW)


@pytest.mark.parametrize(
    ("shape", "lrs"),
    [
        # warm-up, warm-up, flat, flat, the first of 4 steps of decay at the peak, ...
        ("linear", [0.4, 0.8, 0.8, 0.8, 0.8, 0.625, 0.45, 0.275]),
        ("exponential", [0.4, 0.8, 0.8, 0.8, 0.8, 0.4757, 0.2828, 0.1682]),
    ],
)
def test_learning_rate_is_flat_between_warmup_and_decay(shape: Any, lrs: list[float]) -> None:
    schedule = WarmupStableDecay(
        0.8, 0.1, warmup_steps=2, decay_steps=4, total_steps=8, shape=shape
    )
    assert [schedule.lr_at(t) for t in range(8)] == pytest.approx(lrs, abs=1e-4)
