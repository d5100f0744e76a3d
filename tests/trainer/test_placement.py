"""Who looks sees the iterate: hooks, callbacks and validation; and looking changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.toys import (
    Recorder,
    Toy,
    adamw,
    ema_directions,
    ema_nesterov,
    equal,
    loader,
    lookahead_point,
    make_trainer,
    relative_error,
    snapshot,
    trajectory_of,
)
from tests.versions import EMAWeightAveraging

OUTSIDE = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_end",
    "on_fit_end",
)


class Forwards(Toy):
    """Remembers where it took its gradients."""

    def __init__(self) -> None:
        super().__init__(adamw)
        self.points: list[list[Tensor]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.points.append(snapshot(self))
        return self.forward(batch)


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_every_hook_outside_the_training_step_sees_the_iterate(
    accumulate: int, is_first: bool
) -> None:
    """Validation every three batches, also inside accumulation windows; callback first or last."""
    expected = trajectory_of(Toy(adamw), accumulate=accumulate, num_steps=6)
    directions = ema_directions(expected)
    module, recorder = Forwards(), Recorder(*OUTSIDE)
    callbacks = [ema_nesterov(), recorder] if is_first else [recorder, ema_nesterov()]
    trainer = make_trainer(
        callbacks, max_epochs=1, accumulate_grad_batches=accumulate, val_check_interval=3
    )
    trainer.fit(module, loader(6 * accumulate), loader(2))
    assert {hook for hook, _, _ in recorder.seen} == set(OUTSIDE)
    for hook, step, params in recorder.seen:
        # float32 training against the float64 oracle; y is 100 times farther from x.
        assert relative_error(params, expected[step]) < 1e-5, hook
    assert len(module.points) == 6 * accumulate
    for batch_idx, params in enumerate(module.points):
        step = batch_idx // accumulate
        assert relative_error(params, lookahead_point(expected[step], directions[step])) < 1e-5
        assert step == 0 or relative_error(params, expected[step]) > 1e-4


@pytest.mark.parametrize("accumulate", [1, 4])
def test_looking_does_not_disturb_training(accumulate: int) -> None:
    quiet, watched = Toy(adamw), Toy(adamw)
    options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    make_trainer(ema_nesterov(), **options).fit(quiet, loader(16))
    recorder = Recorder(*OUTSIDE)
    make_trainer([ema_nesterov(), recorder], val_check_interval=3, **options).fit(
        watched, loader(16), loader(2)
    )
    assert equal(snapshot(quiet), snapshot(watched))
    # 2 epochs of 16 batches, 5 validations of 2 batches each, and the ends.
    assert len(recorder.seen) == 2 * (2 * 16 + 5 * (4 + 2) + 2) + 2


def test_validation_between_windows_sees_the_iterate_bit_for_bit() -> None:
    """Where no y was in memory, validation sees exactly what training without it leaves."""
    recorder, module = Recorder("on_validation_batch_start"), Toy(adamw)
    trainer = make_trainer([ema_nesterov(), recorder], max_epochs=1, val_check_interval=1)
    trainer.fit(module, loader(6), loader(1))
    for _, step, params in recorder.seen:
        stopped = Toy(adamw)
        make_trainer(ema_nesterov(), max_steps=step).fit(stopped, loader(6))
        assert equal(params, snapshot(stopped))
    assert [step for _, step, _ in recorder.seen] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("limit_val_batches", [0, 1])
def test_early_stop_in_the_middle_of_a_window_ends_at_the_iterate(
    limit_val_batches: int, steps_of_four_batches: list[list[Tensor]]
) -> None:
    """Nobody looks between two batches here: only the end of the epoch and of fit do."""

    class Stops(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.trainer.should_stop = batch_idx == 13
            return self.forward(batch)

    module, recorder = Stops(adamw), Recorder("on_validation_start", "on_train_epoch_end")
    trainer = make_trainer(
        [ema_nesterov(), recorder],
        max_epochs=1,
        accumulate_grad_batches=4,
        limit_val_batches=limit_val_batches,
    )
    trainer.fit(module, loader(24), loader(1))
    assert trainer.global_step == 3
    assert len(recorder.seen) == 1 + limit_val_batches
    for params in (snapshot(module), *recorder.params):
        assert relative_error(params, steps_of_four_batches[3]) < 1e-5


def test_on_train_batch_start_that_ends_the_epoch_leaves_the_iterate(
    steps_of_four_batches: list[list[Tensor]],
) -> None:
    class Ends(Toy):
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
            return -1 if batch_idx == 6 else None

    module, recorder = Ends(adamw), Recorder("on_train_epoch_end")
    trainer = make_trainer([recorder, ema_nesterov()], max_epochs=1, accumulate_grad_batches=4)
    trainer.fit(module, loader(24))
    assert trainer.global_step == 1
    for params in (snapshot(module), *recorder.params):
        assert relative_error(params, steps_of_four_batches[1]) < 1e-5


class LooksAtTheState(Recorder):
    """Sees parameters and the direction after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.directions: list[list[Tensor]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self.seen.append(("on_train_batch_end", trainer.global_step, snapshot(pl_module)))
        states = trainer.optimizers[0].state.values()
        self.directions.append([state[DIRECTION_KEY].clone() for state in states])


class LooksWhileItAverages(EMAWeightAveraging):
    """An average that copies what it is about to average."""

    def __init__(self) -> None:
        super().__init__(decay=0.5)
        self.seen: list[list[Tensor]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self.seen.append(snapshot(pl_module))
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("is_first", [False, True])
def test_step_skipped_by_the_scaler_leaves_the_iterate(is_first: bool, fused: bool) -> None:
    class Overflows(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.forward(batch) * (float("inf") if batch_idx == 3 else 1.0)

    module = Overflows(lambda params: torch.optim.AdamW(params, lr=1e-2, fused=fused))
    recorder, averaging = LooksAtTheState(), LooksWhileItAverages()
    callback = ema_nesterov()
    order = [callback, averaging] if is_first else [averaging, callback]
    trainer = make_trainer(
        [*order, recorder],
        max_steps=6,
        plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))],
    )
    trainer.fit(module, loader(6))
    assert trainer.global_step == 6
    x, m = recorder.params, recorder.directions
    assert relative_error(x[3], x[2]) < 1e-7  # skipped: x stays, but for one rounding
    assert relative_error(x[4], x[3]) > 1e-3  # and moves on
    # A fused optimizer begins its step: the fold of the direction is undone, with rounding.
    assert relative_error(m[3], m[2]) < 1e-6
    assert relative_error(m[4], m[3]) > 1e-2
    assert all(equal(seen, params) for seen, params in zip(averaging.seen, x, strict=True))


def test_a_model_that_is_put_in_evaluation_mode_in_a_window_holds_the_iterate() -> None:
    """Lightning calls that hook of the module before those of callbacks."""

    class Looks(Forwards):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[list[Tensor]] = []

        def on_validation_model_eval(self) -> None:
            self.seen.append(snapshot(self))
            self.eval()

    module, recorder = Looks(), Recorder("on_validation_start")
    trainer = make_trainer(
        [ema_nesterov(), recorder],
        max_epochs=1,
        accumulate_grad_batches=4,
        val_check_interval=3,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, loader(24), loader(2))
    assert len(module.seen) == len(recorder.params) == 8
    for seen, expected in zip(module.seen, recorder.params, strict=True):
        assert equal(seen, expected)
