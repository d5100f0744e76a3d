"""The Trainer of transformers with the class that the documentation gives."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.other_trainers.problem import (
    EMA_DECAY,
    STEP_SIZE,
    Net,
    averages,
    check,
    examples,
    loss_at,
    oracle,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NUM_STEPS = 10
WARMUP_STEPS = 2


def lr_factor(step_idx: int) -> float:
    """Hugging Face's linear schedule: up in the first steps, then down to 0."""
    if step_idx < WARMUP_STEPS:
        return step_idx / WARMUP_STEPS
    return (NUM_STEPS - step_idx) / (NUM_STEPS - WARMUP_STEPS)


RUN: dict[str, Any] = {
    "step_size": lambda t: STEP_SIZE * lr_factor(t),
    "make_scheduler": lambda optimizer: LambdaLR(optimizer, lr_factor),
}


def recipe() -> Any:
    """What the recipe defines, new for each test."""
    file = ROOT / "recipes" / "other_trainers" / "hugging_face.py"
    spec = importlib.util.spec_from_file_location("hugging_face_recipe", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_trainer(
    folder: Path, *, dtype: torch.dtype = torch.float64, method: str = "class", **kwargs: Any
) -> Any:
    options = {"evaluate_at": "iterate", "warmup": 0, "rest": 0, "accumulate": 1, **kwargs}
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=NUM_STEPS,
        per_device_train_batch_size=4 // options["accumulate"],
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=options.pop("accumulate"),
        learning_rate=1e-2,
        warmup_steps=WARMUP_STEPS,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        max_grad_norm=0.0,
        logging_steps=1,
        save_steps=5,
        eval_strategy="steps",
        eval_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    kind, callbacks = transformers.Trainer, []
    options = {"ema_decay": EMA_DECAY, **options}
    if method == "class":
        kind = recipe().Trainer
        kind.ema_nesterov_args = options
    elif method == "callback":
        callbacks = [recipe().EMANesterovCallback(**options)]
    rows = examples(dtype)
    return kind(Net(dtype), args, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)


@pytest.mark.parametrize("method", ["class", "callback"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_matches_the_reference(method: str, accumulate: int, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, method=method, accumulate=accumulate)
    trainer.train()
    check(trainer.model.parameters(), NUM_STEPS, **RUN)


@pytest.mark.parametrize("evaluate_at", ["iterate", "average"])
def test_evaluation_sees_the_iterate_or_the_average(evaluate_at: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, evaluate_at=evaluate_at)
    trainer.train()
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    points = iterates = oracle(NUM_STEPS, **RUN)
    if evaluate_at == "average":
        points = averages(iterates)
    losses = [float(loss_at(point)) for point in points]
    assert found == pytest.approx(losses[1:], rel=1e-9)
    assert losses[1:] != pytest.approx([float(loss_at(x)) for x in averages(iterates)[:-1]])


def test_scalars_are_in_the_logs(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    iterates = oracle(NUM_STEPS, **RUN)
    for t, entry in enumerate(logs):
        moved = [b - a for a, b in zip(iterates[t], iterates[t + 1], strict=True)]
        norm = math.sqrt(sum(float(d.square().sum()) for d in moved))
        assert entry["ema_nesterov/displacement_norm"] == pytest.approx(norm, rel=1e-6, abs=1e-9)
        assert entry["ema_nesterov/step_size"] == pytest.approx(STEP_SIZE * lr_factor(t))
    assert len(logs) == NUM_STEPS


@pytest.mark.parametrize(
    ("method", "dtype", "is_exact"),
    [
        ("class", torch.float32, True),
        ("class", torch.bfloat16, True),
        ("callback", torch.float32, True),
        ("callback", torch.bfloat16, False),  # as the documentation says
        ("none", torch.float32, False),
    ],
    ids=str,
)
def test_resumed_run_is_bitwise_the_same(
    method: str, dtype: torch.dtype, is_exact: bool, tmp_path: Path
) -> None:
    whole = make_trainer(tmp_path / "whole", dtype=dtype)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", method=method, dtype=dtype)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    pairs = zip(*map(weights_and_directions, (whole, resumed)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) == is_exact


def weights_and_directions(trainer: Any) -> list[Tensor]:
    """Weights in bfloat16 may round alike where the directions do not."""
    params = list(trainer.model.parameters())
    return [*params, *(trainer.optimizer.state[p][DIRECTION_KEY] for p in params)]


def test_checkpoint_holds_the_iterate(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    make_trainer(tmp_path).train()
    saved = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    expected = oracle(NUM_STEPS, **RUN)[5]
    actual = [saved[name] for name, _ in Net().named_parameters()]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["class", "callback"])
def test_a_second_call_of_train_goes_on(method: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, method=method)
    trainer.train()
    trainer.args.max_steps = 2 * NUM_STEPS
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{NUM_STEPS}"))
    assert trainer.state.global_step == 2 * NUM_STEPS
