"""LitGPT's validation at the average of the iterates, and weights made of its checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

import litgpt.__main__
import pytest
import torch
from torch import Tensor

from lightning_ema_nesterov.averages import average_checkpoint
from tests.litgpt.runs import (
    ACCUMULATE,
    BY_ROLE,
    NUM_STEPS,
    Run,
    load,
    loss_at,
    scalars,
    start,
    weights,
    with_lookahead,
    write_config,
)
from tests.toys import equal

# A checkpoint of every step: the iterates, and the optimizer's names for them.
EVERY_STEP = {"save_interval": 1}


def averages_of(out: Path) -> dict[int, dict[str, Tensor]]:
    """The averages of the iterates x_1 ... x_t, which begin at x_1, in float64."""
    found: dict[int, dict[str, Tensor]] = {}
    average: dict[str, Tensor] = {}
    for step in range(1, NUM_STEPS + 1):
        model = load(out / f"step-{step:08d}")["model"]
        exact = {name: x.double() for name, x in model.items()}
        average = {n: 0.9 * average.get(n, x) + 0.1 * x for n, x in exact.items()}
        found[step] = average
    return found


def with_start(
    average: dict[str, Tensor], step: int, first: dict[str, Tensor], before: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Begin an average at x_0 in place of x_1."""
    return {n: a + 0.9**step * (before[n].double() - first[n].double()) for n, a in average.items()}


def test_validation_is_at_the_average_and_checkpoints_at_the_iterate(
    run: Run, folder: Path
) -> None:
    options = {"seed": 7, "train": EVERY_STEP}
    plain = run(out_dir="plain", optimizer=with_lookahead(BY_ROLE, warmup=3), **options)
    out = run(
        out_dir="average",
        optimizer=with_lookahead(BY_ROLE, warmup=3, evaluate_at="average"),
        **options,
    )
    for step in (1, 10, 20):
        path = f"step-{step:08d}"
        assert equal(weights(out / path), weights(plain / path))
    # x_0 from x_1 and the direction of the first step, m_1 = 0.1 (x_1 - x_0).
    averages = averages_of(out)
    first = load(out / "step-00000001")
    average_checkpoint(out / "step-00000001/lit_model.pth", folder / "first.pth")
    at_first = torch.load(folder / "first.pth", weights_only=True)["model"]
    before = {
        n: x.double() + (at_first[n].double() - x.double()) / 0.9 for n, x in first["model"].items()
    }
    logged, at_iterate = scalars(out, "val_loss"), scalars(plain, "val_loss")
    for step in (5, 10, 15, 20):
        exact = with_start(averages[step], step, first["model"], before)
        iterate = load(out / f"step-{step:08d}")["model"]
        place = step * ACCUMULATE - 1
        expected = loss_at({n: a.float() for n, a in exact.items()}, folder)
        assert logged[place] == pytest.approx(expected, rel=1e-5)
        assert at_iterate[place] == loss_at(iterate, folder)
        assert abs(logged[place] - at_iterate[place]) > 1e-3
        target = folder / f"{step}.pth"
        average_checkpoint(out / f"step-{step:08d}/lit_model.pth", target)
        made = torch.load(target, weights_only=True)["model"]
        for name, a in exact.items():
            torch.testing.assert_close(made[name].double(), a, rtol=1e-5, atol=1e-6)


def test_share_reaches_the_validation(run: Run, folder: Path) -> None:
    optimizer = with_lookahead(evaluate_at="average", average_share=0.5)
    out = run(optimizer=optimizer)
    average_checkpoint(out / "final/lit_model.pth", folder / "half.pth", share=0.5)
    half = torch.load(folder / "half.pth", weights_only=True)["model"]
    logged = scalars(out, "val_loss")[NUM_STEPS * ACCUMULATE - 1]
    assert logged == pytest.approx(loss_at(half, folder), rel=1e-6)
    assert abs(logged - loss_at(load(out / "final")["model"], folder)) > 1e-3


@pytest.mark.slow
def test_litgpt_converts_and_generates_from_the_average(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Path(__file__).parents[2] / "recipes/byte_tokenizer"
    optimizer = with_lookahead(evaluate_at="average")
    out = run("--tokenizer_dir", str(tokenizer), optimizer=optimizer)
    target = folder / "average"
    average_checkpoint(out / "final/lit_model.pth", target / "lit_model.pth")
    convert = ["convert_pretrained_checkpoint", str(target), str(folder / "converted")]
    options = ["--prompt", "the ", "--max_new_tokens", "8", "--precision", "32-true"]
    generate = ["generate", str(folder / "converted"), *options]
    for arguments in (convert, generate, ["generate", str(target), *options]):
        monkeypatch.setattr(sys, "argv", ["litgpt", *arguments])
        litgpt.__main__.main()
    converted = torch.load(folder / "converted/lit_model.pth", weights_only=True)
    assert equal([converted[name] for name in sorted(converted)], weights(target))
    assert not equal(weights(target), weights(out / "final"))
    assert capsys.readouterr().out.splitlines()[-1].startswith("the ")


@pytest.mark.slow
def test_stock_command_validates_at_the_average(folder: Path) -> None:
    """`litgpt pretrain` in a process of its own."""
    optimizer = with_lookahead(evaluate_at="average")
    write_config(folder, optimizer=optimizer)
    start("--config", "config.yaml", "--out_dir", "out", folder=folder).finish()
    source = folder / "out/final/lit_model.pth"
    average_checkpoint(source, folder / "average/lit_model.pth")
    logged = scalars(folder / "out", "val_loss")[NUM_STEPS * ACCUMULATE - 1]
    made = load(folder / "average")["model"]
    assert logged == pytest.approx(loss_at(made, folder), rel=1e-6)
    assert abs(logged - loss_at(load(folder / "out/final")["model"], folder)) > 1e-3
