"""What parameters hold when somebody looks, and what a checkpoint continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_ema_nesterov.averages import average_checkpoint
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.toys import (
    Recorder,
    Toy,
    adamw,
    ema_nesterov,
    equal,
    loader,
    make_trainer,
    relative_error,
    snapshot,
    trajectory_of,
)

FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "compile": {"compile": True},
    "bfloat16": {"direction_dtype": "bfloat16"},
    "int8": {"direction_dtype": "int8"},
}


@pytest.mark.parametrize("form", FORMS)
def test_others_see_the_iterate_and_validation_the_average(
    form: str, device: torch.device, tmp_path: Path
) -> None:
    steps = Recorder("on_train_batch_end")
    evaluations = Recorder("on_validation_batch_end")
    module = Toy(adamw)
    start = snapshot(module)
    callback = ema_nesterov(evaluate_at="average", **FORMS[form])
    trainer = make_trainer(
        [callback, steps, evaluations],
        max_steps=6,
        accelerator=device.type,
        val_check_interval=2,
    )
    trainer.fit(module, loader(6), loader(1))
    assert {p.device.type for p in steps.params[-1]} == {device.type}
    assert [step for _, step, _ in evaluations.seen] == [2, 4, 6]
    averages, average = [start], [x.double() for x in start]
    for iterate in steps.params:
        pairs = zip(average, iterate, strict=True)
        average = [0.9 * a + 0.1 * x.cpu().double() for a, x in pairs]
        averages.append(average)
    # The direction's rounding, which is 9 times as large in the average; float32 else. In int8
    # matrices as small as these are kept in float32.
    bound = 3e-3 if form == "bfloat16" else 1e-6
    for _, step, seen in evaluations.seen:
        assert relative_error(seen, averages[step]) < bound
        assert relative_error(seen, steps.params[step - 1]) > 1e-2
    path, weights = tmp_path / "last.ckpt", tmp_path / "average.ckpt"
    trainer.save_checkpoint(path)
    average_checkpoint(path, weights)
    loaded = torch.load(weights, map_location="cpu")
    found = list(loaded.get("state_dict", loaded).values())
    assert relative_error(found, averages[6]) < bound
    if form == "default":
        assert relative_error(steps.params[-1], trajectory_of(Toy(adamw), num_steps=6)[-1]) < 1e-5


def fit(device: torch.device, form: str, *, num_epochs: int = 4, **kwargs: Any) -> Trainer:
    """Train in epochs of three steps: Lightning continues exactly between two epochs."""
    path = kwargs.pop("ckpt_path", None)
    trainer = make_trainer(
        ema_nesterov(warmup=2, rest=2, total_steps=12, **FORMS[form]),
        max_epochs=num_epochs,
        accelerator=device.type,
        **kwargs,
    )
    trainer.fit(Toy(adamw), loader(3), ckpt_path=path)
    return trainer


def every_tensor(trainer: Trainer) -> list[Tensor]:
    states = [s for o in trainer.optimizers for s in o.state.values()]
    assert all(DIRECTION_KEY in state for state in states)
    tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    return [*snapshot(trainer.lightning_module), *tensors]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("form", FORMS)
def test_resume_is_bitwise_as_if_never_stopped(
    form: str, precision: str, device: torch.device, tmp_path: Path
) -> None:
    path = tmp_path / "stopped.ckpt"
    options: dict[str, Any] = {"precision": precision}
    whole = fit(device, form, **options)
    stopped = fit(device, form, num_epochs=2, **options)
    stopped.save_checkpoint(path)
    resumed = fit(device, form, ckpt_path=path, **options)
    assert equal(every_tensor(whole), every_tensor(resumed))
    assert not equal(every_tensor(whole), every_tensor(stopped))


def test_checkpoint_of_the_device_continues_on_the_cpu(
    device: torch.device, tmp_path: Path
) -> None:
    path = tmp_path / "stopped.ckpt"
    fit(device, "default", num_epochs=2).save_checkpoint(path)
    resumed = fit(torch.device("cpu"), "default", ckpt_path=path)
    whole = fit(torch.device("cpu"), "default")
    # float32 rounding over six steps; m is a thousandth of x.
    assert relative_error(snapshot(resumed.lightning_module), snapshot(whole.lightning_module)) < (
        1e-5
    )
    assert relative_error(every_tensor(resumed), every_tensor(whole)) < 1e-4
