"""LitGPT on two processes: DDP, FSDP1 and FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest
from litgpt import GPT, Config

from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.litgpt.runs import (
    BY_ROLE,
    NUM_STEPS,
    Run,
    config_of,
    flat,
    load,
    pretrain_on_two,
    scalars,
    weights,
    with_lookahead,
    write_config,
)
from tests.toys import equal, relative_error

pytestmark = pytest.mark.slow


def test_two_processes_equal_one_bitwise(run: Run, folder: Path) -> None:
    """DDP through the launcher, with Muon, which LitGPT's own FSDP1 cannot run."""
    optimizer = flat(with_lookahead(BY_ROLE))
    one = run(out_dir="one", optimizer=optimizer)
    plain = run(out_dir="plain", optimizer=flat(BY_ROLE))
    write_config(folder, optimizer=optimizer)
    arguments = ("--config", "config.yaml", "--out_dir", "two")
    options = ("--strategy", "ddp", "--train.save_interval", "20")
    pretrain_on_two(*arguments, *options, folder=folder)
    # Micro-batches are as large as in one process, and two halves have one sum: nothing rounds
    # otherwise, also where Muon's products are in bfloat16 and CPUs differ.
    assert equal(weights(folder / "two/final"), weights(one / "final"))
    assert relative_error(weights(plain / "final"), weights(one / "final")) > 1e-2
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
