"""Checkpoints and validation hold the iterate, and a run continues from it as if never stopped."""

from __future__ import annotations

import sys
from pathlib import Path

import litgpt.__main__
import pytest
import torch
from litgpt import GPT, Config

from lightning_ema_nesterov.optimizers import groups_by_role
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.litgpt.runs import (
    ACCUMULATE,
    BY_ROLE,
    MICRO_BATCH,
    TWO_FILES,
    WINDOW,
    Run,
    config_of,
    flat,
    load,
    loss_at,
    scalars,
    start,
    weights,
    with_lookahead,
)
from tests.toys import equal


def check_placement(out: Path, folder: Path) -> None:
    """Validation saw what the checkpoint of its step holds, and that is not the lookahead point."""
    logged = scalars(out, "val_loss")
    gpt = GPT(Config(**config_of(folder)["model_config"]))
    hidden = groups_by_role(gpt).names[0]
    in_order = [*hidden, *(name for name, _ in gpt.named_parameters() if name not in hidden)]
    for step in (5, 10, 15, 20):
        checkpoint = load(out / f"step-{step:08d}")
        model, optimizer = checkpoint["model"], checkpoint["optimizer"]
        # Bit for bit: what TensorBoard holds is a float32.
        assert logged[step * ACCUMULATE - 1] == loss_at(model, folder)
        m = [state[DIRECTION_KEY] for state in optimizer["state"].values()]
        y = {name: model[name] + 0.5 * m_i for name, m_i in zip(in_order, m, strict=True)}
        assert abs(loss_at({**model, **y}, folder) - loss_at(model, folder)) > 1e-4
    assert equal(weights(out / "final"), weights(out / "step-00000020"))


def test_validation_and_checkpoints_hold_the_iterate(run: Run, folder: Path) -> None:
    out = run("--seed", "7", optimizer=flat(with_lookahead(BY_ROLE, warmup=3), decay=0.25))
    check_placement(out, folder)


@pytest.mark.slow
def test_validation_and_checkpoints_of_the_stock_command_hold_the_iterate(stock: Path) -> None:
    check_placement(stock / "whole", stock)


def test_a_run_continues_bitwise_with_its_direction_and_not_without(run: Run, folder: Path) -> None:
    optimizer = flat(with_lookahead(BY_ROLE, warmup=3), decay=0.25)
    whole = run(optimizer=optimizer)
    path = whole / "step-00000010/lit_model.pth"
    checkpoint = torch.load(path, weights_only=True)
    resumed = run(out_dir="resumed", optimizer=optimizer, resume=path)
    for state in checkpoint["optimizer"]["state"].values():
        state[DIRECTION_KEY].zero_()
    torch.save(checkpoint, folder / "without.pth")
    without = run(out_dir="without", optimizer=optimizer, resume=folder / "without.pth")
    assert equal(weights(resumed / "final"), weights(whole / "final"))
    assert not equal(weights(without / "final"), weights(whole / "final"))
    after = {x: loss for x, loss in scalars(whole, "loss").items() if x >= 10 * ACCUMULATE}
    assert len(after) == 10
    assert scalars(resumed, "loss") == after


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
    assert len(norms) == 10
    assert min(norms.values()) > 0


@pytest.mark.slow
def test_killed_run_continues_bitwise(stock: Path) -> None:
    arguments = (*TWO_FILES, "--out_dir", "cut")
    killed = start(*arguments, folder=stock)
    killed.wait_for("step 13 ")  # between two checkpoints
    killed.kill()
    assert not (stock / "cut/final").exists()
    resumed = start(*arguments, "--resume", "auto", folder=stock)
    assert "Resuming training from" in resumed.finish()
    assert equal(weights(stock / "cut/final"), weights(stock / "whole/final"))
    for tag in ("loss", "val_loss", "ema_nesterov/direction_norm"):
        assert scalars(stock / "cut", tag) == scalars(stock / "whole", tag)


@pytest.mark.slow
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
