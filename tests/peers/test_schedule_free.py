"""Schedule-Free optimizers in the Trainer: the average wherever anyone looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import Optimizer

from lightning_ema_nesterov.peers import ScheduleFree
from tests.toys import (
    Batches,
    Recorder,
    Toy,
    adamw,
    equal,
    loader,
    make_trainer,
    relative_error,
    snapshot,
)


def schedule_free(params: Any) -> Optimizer:
    optimizer: Optimizer = schedulefree.AdamWScheduleFree(params, lr=1e-2)
    return optimizer


def test_schedule_free_is_evaluated_and_saved_at_the_average(tmp_path: Path) -> None:
    """As a loop by hand that follows the package's own instructions."""
    model = Toy(schedule_free)
    optimizer: Any = schedule_free(model.parameters())
    for batch in Batches(10).data:
        optimizer.train()
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    gradient_point = snapshot(model)
    optimizer.eval()

    watch = Recorder("on_validation_start")
    trained = Toy(schedule_free)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=10)
    trainer = make_trainer([ScheduleFree(), watch, saver], max_steps=10, enable_checkpointing=True)
    trainer.fit(trained, loader(10), loader(1))
    assert equal(snapshot(trained), snapshot(model))
    [path] = tmp_path.glob("*.ckpt")
    saved = torch.load(path, weights_only=False)["state_dict"]
    for found in (watch.params[-1], list(saved.values())):
        assert relative_error(found, snapshot(model)) < 1e-6
        assert relative_error(found, gradient_point) > 1e-4


def test_schedule_free_resumes_bitwise(tmp_path: Path) -> None:
    def run(num_steps: int, checkpoint: str | None = None) -> list[Tensor]:
        model = Toy(schedule_free)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = make_trainer(
            [ScheduleFree(), saver], max_steps=num_steps, enable_checkpointing=True
        )
        trainer.fit(model, loader(4), ckpt_path=checkpoint)
        return snapshot(model)

    whole = run(12)
    path = str(tmp_path / "step=4.ckpt")
    assert equal(whole, run(12, path))
    assert not equal(whole, run(8, path))


def test_optimizer_that_cannot_be_switched_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"needs optimizers with train\(\)"):
        make_trainer(ScheduleFree(), max_steps=1).fit(Toy(adamw), loader(1))
