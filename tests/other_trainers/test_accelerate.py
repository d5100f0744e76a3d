"""Loops with Accelerate: prepared optimizers, accumulation, evaluation, saving and resuming."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from tests.other_trainers import processes
from tests.other_trainers.accelerate_loop import NUM_STEPS, Loop, lr_factor
from tests.other_trainers.problem import (
    STEP_SIZE,
    Net,
    averages,
    check,
    loss_at,
    oracle,
)

pytestmark = pytest.mark.skipif(
    find_spec("accelerate") is None, reason="accelerate is not installed"
)

RUN: dict[str, Any] = {
    "step_size": lambda t: STEP_SIZE * lr_factor(t),
    "make_scheduler": lambda optimizer: LambdaLR(optimizer, lr_factor),
}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_matches_the_reference(accumulate: int) -> None:
    loop = Loop(accumulate=accumulate)
    loop.train(NUM_STEPS)
    check(loop.params(), NUM_STEPS, **RUN)


@pytest.mark.parametrize("evaluate_at", ["iterate", "average"])
def test_evaluation_sees_the_iterate_or_the_average(evaluate_at: str) -> None:
    loop = Loop(accumulate=2, evaluate_at=evaluate_at)
    loop.train(NUM_STEPS)
    iterates = oracle(NUM_STEPS, **RUN)
    points = averages(iterates) if evaluate_at == "average" else iterates
    losses = [float(loss_at(points[(idx + 1) // 2])) for idx in range(2 * NUM_STEPS)]
    assert loop.eval_losses == pytest.approx(losses, rel=1e-9)
    check(loop.params(), NUM_STEPS, **RUN)  # as if nobody had looked


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_resumed_run_is_bitwise_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    whole, resumed, fresh = Loop(dtype=dtype), None, None
    whole.train(4)
    whole.accelerator.save_state(str(tmp_path / "half"))
    whole.train(NUM_STEPS - 4)
    resumed = Loop(dtype=dtype)
    resumed.accelerator.load_state(str(tmp_path / "half"))
    resumed.train(NUM_STEPS - 4)
    pairs = zip(whole.params(), resumed.params(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    fresh = Loop(dtype=dtype, lookahead_step_size=0.0)
    fresh.accelerator.load_state(str(tmp_path / "half"))
    fresh.train(NUM_STEPS - 4)
    pairs = zip(whole.params(), fresh.params(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_saved_weights_are_the_iterate(tmp_path: Path) -> None:
    """Also those that are saved in the middle of an accumulation window."""
    from safetensors.torch import load_file

    loop = Loop(accumulate=2)
    loop.train(4)
    with loop.accelerator.accumulate(loop.model):
        loop.accelerator.backward(loop.model(**next(iter(loop.loader)))["loss"])
        loop.accelerator.save_state(str(tmp_path / "window"))
    saved = load_file(tmp_path / "window" / "model.safetensors")
    actual = [saved[name] for name, _ in Net().named_parameters()]
    torch.testing.assert_close(actual, oracle(4, **RUN)[-1], rtol=1e-10, atol=1e-12)
    moved = [p - x for p, x in zip(loop.params(), actual, strict=True)]
    assert max(float(d.abs().max()) for d in moved) > 1e-4


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_processes_match_the_reference_and_resume(
    strategy: str, accumulate: str, tmp_path: Path
) -> None:
    result = processes.run("accelerate_loop", tmp_path / "run", strategy, accumulate)
    assert result["is_sharded"] == (strategy == "fsdp2")
    check(result["params"], NUM_STEPS, **RUN)
    pairs = zip(result["params"], result["resumed"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    losses = [float(loss_at(x)) for x in oracle(NUM_STEPS, **RUN)[1:]]
    each = int(accumulate)
    assert result["eval_losses"][each - 1 :: each] == pytest.approx(losses, rel=1e-9)
