"""What an exception leaves: the iterate, in memory and in files, and a run that can go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.optim import Optimizer

from lightning_ema_nesterov.core.progress import STEP_KEY
from tests.core import reference
from tests.toys import (
    Batches,
    HalfStep,
    Recorder,
    Toy,
    adamw,
    batch_gradients,
    ema_nesterov,
    equal,
    loader,
    make_trainer,
    relative_error,
    sgd,
    snapshot,
    trajectory_of,
)


def saved_weights(path: Path) -> list[Tensor]:
    return list(torch.load(path, weights_only=False)["state_dict"].values())


class Fails(Toy):
    """Raises in batch 14: before its forward pass, or after it."""

    def __init__(self, error: BaseException, *, is_after_forward: bool) -> None:
        super().__init__(adamw)
        self.error = error
        self.is_after_forward = is_after_forward

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx != 14:
            return self.forward(batch)
        if self.is_after_forward:
            self.forward(batch)
        raise self.error


@pytest.mark.parametrize("is_after_forward", [False, True])
@pytest.mark.parametrize("error", [ZeroDivisionError("on purpose"), KeyboardInterrupt()])
def test_exception_leaves_and_saves_the_iterate(
    error: BaseException,
    is_after_forward: bool,
    steps_of_four_batches: list[list[Tensor]],
    tmp_path: Path,
) -> None:
    """Batch 14 of windows of 4: in the middle of the fourth window."""
    module, recorder = Fails(error, is_after_forward=is_after_forward), Recorder("on_exception")
    trainer = make_trainer(
        [recorder, OnExceptionCheckpoint(tmp_path, "stopped"), ema_nesterov()],
        max_epochs=1,
        accumulate_grad_batches=4,
        enable_checkpointing=True,
    )
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else ZeroDivisionError):
        trainer.fit(module, loader(24))
    [seen] = recorder.params
    for params in (snapshot(module), seen, saved_weights(tmp_path / "stopped.ckpt")):
        # float32 training against the float64 oracle; y is 100 times farther from x.
        assert relative_error(params, steps_of_four_batches[3]) < 1e-5
    assert "training_step" not in vars(trainer.strategy)
    assert "save_checkpoint" not in vars(trainer)


def test_sigterm_in_the_middle_of_a_window_saves_the_iterate(
    steps_of_four_batches: list[list[Tensor]], tmp_path: Path
) -> None:
    class Terminated(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 13:
                os.kill(os.getpid(), signal.SIGTERM)
            return self.forward(batch)

    module = Terminated(adamw)
    trainer = make_trainer(
        [OnExceptionCheckpoint(tmp_path, "stopped"), ema_nesterov()],
        max_epochs=1,
        accumulate_grad_batches=4,
        enable_checkpointing=True,
    )
    with pytest.raises(SIGTERMException):
        trainer.fit(module, loader(24))
    for params in (snapshot(module), saved_weights(tmp_path / "stopped.ckpt")):
        assert relative_error(params, steps_of_four_batches[3]) < 1e-5


def test_full_disk_while_saving_raises_and_leaves_the_iterate(
    steps_of_four_batches: list[list[Tensor]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The save fails in the middle of a window, after the parameters were returned for it."""

    class Saves(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 9:
                self.trainer.save_checkpoint(tmp_path / "full.ckpt")
            return self.forward(batch)

    def no_space(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    module = Saves(adamw)
    trainer = make_trainer(ema_nesterov(), max_epochs=1, accumulate_grad_batches=4)
    monkeypatch.setattr(trainer.strategy, "save_checkpoint", no_space)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(module, loader(24))
    assert relative_error(snapshot(module), steps_of_four_batches[2]) < 1e-5


class Catches(Toy):
    """Trains on after a step that failed when it had stepped the first parameter."""

    def __init__(self) -> None:
        super().__init__(sgd)
        self.automatic_optimization = False
        self.base_optimizer = HalfStep(self.parameters(), lr=5e-2)
        self.num_failures = 0

    def configure_optimizers(self) -> Optimizer:
        return self.base_optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.base_optimizer.fails = batch_idx == 4
        optimizer.zero_grad()
        self.manual_backward(self.forward(batch))
        try:
            optimizer.step()
        except MemoryError:
            self.num_failures += 1


def catches(*callbacks: Any, **kwargs: Any) -> Catches:
    module = Catches()
    trainer = make_trainer([ema_nesterov(), *callbacks], max_epochs=1, **kwargs)
    trainer.fit(module, loader(12), loader(1))
    assert module.num_failures == 1
    # Eleven steps were taken; the one that failed is none.
    assert module.base_optimizer.param_groups[0][STEP_KEY] == 11
    return module


def oracle_of_catches() -> list[list[Tensor]]:
    """A failed step moves the first parameter, and leaves the second and its direction alone."""
    by_batch = batch_gradients(Toy(sgd), Batches(12, torch.float64).data)

    def gradients(params: list[Tensor], step_idx: int) -> list[Tensor | None]:
        first, second = by_batch(params, step_idx)
        return [first, None if step_idx == 4 else second]

    trajectory, _ = reference.train(
        snapshot(Toy(sgd)),
        gradients,
        sgd,
        num_steps=12,
        ema_decay=0.9,
        step_size=lambda _: 0.5,
    )
    return trajectory


def test_step_that_raised_and_was_caught_does_not_change_the_steps_after_it() -> None:
    """Whether someone looks in between or not: validation after each batch, a user's callback."""
    recorder = Recorder("on_train_batch_end", "on_validation_start")
    quiet = catches(limit_val_batches=0)
    evaluated = catches(val_check_interval=1)
    watched = catches(recorder, val_check_interval=1)
    expected = oracle_of_catches()
    for hook in ("on_train_batch_end", "on_validation_start"):
        seen = [params for name, _, params in recorder.seen if name == hook]
        for params, x in zip(seen, expected[1:], strict=True):
            assert relative_error(params, x) < 1e-5  # float32 against float64
    assert relative_error(snapshot(quiet), expected[-1]) < 1e-5
    assert equal(snapshot(quiet), snapshot(evaluated))
    assert equal(snapshot(quiet), snapshot(watched))
    assert relative_error(expected[5], expected[4]) > 1e-3


class SavesWhenItFails(Toy):
    """Saves a checkpoint and evaluates where its step failed, in automatic optimization."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(sgd)
        self.base_optimizer = HalfStep(self.parameters(), lr=5e-2)
        self.path = path

    def configure_optimizers(self) -> Optimizer:
        return self.base_optimizer

    def optimizer_step(self, epoch: int, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        self.base_optimizer.fails = batch_idx == 4
        try:
            super().optimizer_step(epoch, batch_idx, *args, **kwargs)
        except MemoryError:
            if self.path is not None:
                self.trainer.save_checkpoint(self.path)


def test_checkpoint_of_a_step_that_raised_holds_the_iterate_and_training_goes_on(
    tmp_path: Path,
) -> None:
    path = tmp_path / "failed.ckpt"
    modules = [SavesWhenItFails(None), SavesWhenItFails(path)]
    for module in modules:
        make_trainer(ema_nesterov(), max_epochs=1).fit(module, loader(12))
    expected = oracle_of_catches()
    assert relative_error(saved_weights(path), expected[5]) < 1e-5
    assert relative_error(snapshot(modules[1]), expected[-1]) < 1e-5
    assert equal(snapshot(modules[0]), snapshot(modules[1]))


class Refuses(torch.optim.SGD):
    """Raises in its fourth step, before it changes anything."""

    num_steps = 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is not None
        if self.num_steps == 3:
            with torch.enable_grad():
                closure()
            self.point = [p.detach().clone() for p in self.param_groups[0]["params"]]
            raise MemoryError("on purpose")
        self.num_steps += 1
        return super().step(closure)


def test_step_that_raises_before_it_changes_anything_leaves_the_iterate() -> None:
    module = Toy(lambda params: Refuses(params, lr=5e-2))
    trainer = make_trainer(ema_nesterov(), max_steps=6)
    with pytest.raises(MemoryError):
        trainer.fit(module, loader(6))
    x = trajectory_of(Toy(sgd), num_steps=3)[-1]
    [optimizer] = trainer.optimizers
    assert isinstance(optimizer, Refuses)
    assert relative_error(snapshot(module), x) < 1e-6
    assert relative_error(optimizer.point, x) > 1e-3
