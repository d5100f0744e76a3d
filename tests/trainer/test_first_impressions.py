"""What the callback says, when it asks the Trainer, and what it leaves alone."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from lightning_ema_nesterov import EMANesterov
from tests.toys import Batches, Toy, adamw, ema_nesterov, equal, loader, make_trainer, snapshot


class DataInFitStart(Toy):
    """Makes its data in ``on_fit_start``, with random numbers."""

    def on_fit_start(self) -> None:
        self.data = Batches(4)

    def train_dataloader(self) -> Any:
        self.drawn = torch.rand(())
        return DataLoader(self.data, batch_size=None)

    def val_dataloader(self) -> Any:
        self.drawn_for_validation = torch.rand(())
        return DataLoader(self.data, batch_size=None)


def test_the_schedule_is_made_when_training_starts_and_draws_no_random_number() -> None:
    drawn = []
    for callbacks in ([], [EMANesterov()]):
        torch.manual_seed(0)
        module = DataInFitStart(adamw)
        trainer = make_trainer(callbacks, max_epochs=2, num_sanity_val_steps=1)
        trainer.fit(module)
        drawn.append([module.drawn, module.drawn_for_validation])
    assert equal(*drawn)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"warmup": 0.25, "rest": 0.125}, "optimizer steps 2 to 6 of 8."),
        ({"warmup": 3, "rest": 0}, "optimizer steps 3 to 7 of 8."),
    ],
)
def test_the_steps_that_look_ahead_are_said_once(
    kwargs: dict[str, Any], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        make_trainer(EMANesterov(**kwargs), max_epochs=2).fit(Toy(adamw), loader(4))
    said = [r.message for r in caplog.records if "looks ahead" in r.message]
    assert said == [f"EMANesterov looks ahead in {expected}"]


def test_a_run_that_stops_in_its_warmup_is_warned_of() -> None:
    stop = EarlyStopping("val_loss", patience=1, min_delta=math.inf, check_on_train_epoch_end=False)
    trainer = make_trainer([EMANesterov(), stop], max_epochs=1000)
    with pytest.warns(UserWarning, match=r"did not look ahead: the run ended after 4 .*has 1200"):
        trainer.fit(Toy(adamw), loader(4), loader(2))


@pytest.mark.parametrize("kwargs", [{"limit_train_batches": 0}, {"max_steps": 0}])
def test_a_run_that_lightning_skips_is_skipped(kwargs: dict[str, Any]) -> None:
    module = Toy(adamw)
    x = snapshot(module)
    make_trainer(EMANesterov(), max_epochs=2, **kwargs).fit(module, loader(4))
    assert equal(snapshot(module), x)


@pytest.mark.parametrize("kwargs", [{"limit_train_batches": 2}, {"fast_dev_run": 2}])
def test_a_trial_of_a_few_batches_needs_no_schedule_that_fits(kwargs: dict[str, Any]) -> None:
    trainer = make_trainer(EMANesterov(warmup=100, rest=50), max_epochs=1, **kwargs)
    trainer.fit(Toy(adamw), loader(4))
    assert trainer.global_step == 2


@pytest.mark.parametrize(
    ("callback", "kwargs", "message"),
    [
        (EMANesterov(), {"max_epochs": -1, "max_steps": -1}, "has no known end"),
        (EMANesterov(warmup=900, rest=200), {"max_epochs": 100}, "not be longer than the run"),
    ],
)
def test_a_long_run_of_limited_epochs_is_no_trial(
    callback: EMANesterov, kwargs: dict[str, Any], message: str
) -> None:
    trainer = make_trainer(callback, limit_train_batches=4, **kwargs)
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(Toy(adamw), loader(4))


class IteratorStep(Toy):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        loss: Tensor = self(batch)
        return loss


def test_training_step_that_takes_the_iterator_is_logged(tmp_path: Any) -> None:
    trainer = make_trainer(
        ema_nesterov(), max_epochs=1, logger=CSVLogger(tmp_path), log_every_n_steps=1
    )
    trainer.fit(IteratorStep(adamw), loader(4))
    assert trainer.logged_metrics["ema_nesterov/step_size"] == 0.5


def test_all_scalars_are_true_to_the_end_of_the_run(tmp_path: Any) -> None:
    trainer = make_trainer(
        EMANesterov(ema_decay=0.9, warmup=2, rest=4),
        max_epochs=1,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
    )
    trainer.fit(Toy(adamw), loader(12))
    directions = [s["ema_nesterov_direction"] for s in trainer.optimizers[0].state.values()]
    norm = torch.cat([m.flatten() for m in directions]).norm()
    logged = trainer.logged_metrics
    assert logged["ema_nesterov/step_size"] == 0.0
    torch.testing.assert_close(logged["ema_nesterov/direction_norm"], norm)
    assert logged["ema_nesterov/displacement_norm"] > 0


class Groups(Callback):
    """Notes the keys of the parameter groups."""

    def __init__(self) -> None:
        self.keys: set[str] = set()

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.keys |= set(trainer.optimizers[0].param_groups[0])


def test_parameter_groups_have_no_keys_of_ours_in_training() -> None:
    keys = []
    for callbacks in ([], [ema_nesterov()]):
        groups = Groups()
        make_trainer([*callbacks, groups], max_epochs=1).fit(Toy(adamw), loader(4))
        keys.append(groups.keys)
    assert keys[0] == keys[1]


class MoreCallbacks(Toy):
    def configure_callbacks(self) -> list[Callback]:
        return [Groups(), EarlyStopping("val_loss")]


def test_order_of_other_callbacks_stays_and_checkpoints_are_last(tmp_path: Any) -> None:
    orders = []
    for callbacks in ([], [ema_nesterov()]):
        checkpoint = ModelCheckpoint(tmp_path)
        trainer = make_trainer([checkpoint, *callbacks], max_epochs=1, enable_checkpointing=True)
        trainer.fit(MoreCallbacks(adamw), loader(2), loader(2))
        names = [type(c).__name__ for c in trainer.callbacks]  # type: ignore[attr-defined]
        orders.append([name for name in names if name != "EMANesterov"])
    assert orders[0] == orders[1]
    assert orders[0][-1] == "ModelCheckpoint"


def test_repr_shows_the_arguments() -> None:
    text = repr(EMANesterov(0.3, warmup=100))
    assert text.startswith("EMANesterov(lookahead_step_size=0.3, ema_decay=0.99, warmup=100, ")
    assert repr(eval(text)) == text


def test_passes_have_names_in_a_profile() -> None:
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        make_trainer(ema_nesterov(), max_epochs=1).fit(Toy(adamw), loader(3))
    names = {event.key for event in found.key_averages()}
    assert {f"ema_nesterov/{p}" for p in ("extrapolate", "begin", "finish")} <= names
