"""From the configuration to the end of fit, and a second time: nothing stays behind."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.core.progress import STEP_KEY
from tests.toys import (
    Manual,
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


def test_optimizer_stays_the_object_that_the_user_made() -> None:
    class Mine(AdamW):
        pass

    made: list[Optimizer] = []

    class Remembers(Toy):
        def configure_optimizers(self) -> Optimizer:
            made.append(Mine(self.parameters(), lr=1e-2))
            return made[-1]

    class Looks(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            assert trainer.optimizers == made
            assert type(made[0]) is Mine
            assert type(made[0]).step is Mine.step

    module = Remembers(adamw)
    trainer = make_trainer([ema_nesterov(), Looks()], max_steps=3)
    trainer.fit(module, loader(3))
    assert trainer.optimizers == made
    assert len(made) == 1


def test_nothing_is_left_on_the_optimizer_and_the_trainer_after_fit() -> None:
    module = Toy(adamw)
    trainer = make_trainer(ema_nesterov(), max_steps=4)
    trainer.fit(module, loader(4))
    [optimizer] = trainer.optimizers
    optimizer.step()
    assert optimizer.param_groups[0][STEP_KEY] == 4
    assert "training_step" not in vars(trainer.strategy)
    assert not {"save_checkpoint", "load_checkpoint"} & set(vars(trainer.strategy))
    assert "save_checkpoint" not in vars(trainer)


def test_a_save_checkpoint_of_the_users_own_is_put_back() -> None:
    trainer = make_trainer(ema_nesterov(), max_steps=1)
    mine = trainer.save_checkpoint
    vars(trainer)["save_checkpoint"] = mine
    trainer.fit(Toy(adamw), loader(1))
    assert vars(trainer)["save_checkpoint"] is mine


def test_fit_twice_goes_on_and_another_trainer_starts_afresh() -> None:
    module, callback = Toy(adamw), ema_nesterov()
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(module, loader(4))
    assert trainer.optimizers[0].param_groups[0][STEP_KEY] == 8
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader(4))
    assert trainer.global_step == 16
    assert trainer.optimizers[0].param_groups[0][STEP_KEY] == 16
    again, fresh = Toy(adamw), Toy(adamw)
    make_trainer(callback, max_epochs=1).fit(again, loader(4))
    make_trainer(ema_nesterov(), max_epochs=1).fit(fresh, loader(4))
    assert equal(snapshot(again), snapshot(fresh))


def test_callback_can_be_pickled_for_spawned_processes() -> None:
    weights = []
    callback = ema_nesterov(lookahead_step_size=0.25)
    for c in (callback, pickle.loads(pickle.dumps(callback)), ema_nesterov()):
        module = Toy(adamw)
        make_trainer(c, max_steps=4).fit(module, loader(4))
        weights.append(snapshot(module))
    assert equal(weights[0], weights[1])
    assert not equal(weights[0], weights[2])


@pytest.mark.parametrize(
    "kwargs", [{}, {"direction_dtype": "int8"}, {"evaluate_at": "average"}, {"compile": True}]
)
def test_trainer_can_be_pickled_after_fit(kwargs: dict[str, Any]) -> None:
    trainer = make_trainer(ema_nesterov(**kwargs), max_epochs=1)
    trainer.fit(Toy(adamw), loader(4))
    loaded = pickle.loads(pickle.dumps(trainer))
    losses = [t.validate(t.lightning_module, loader(2), verbose=False) for t in (trainer, loaded)]
    assert losses[0] == losses[1]
    with torch.no_grad():
        for p in trainer.lightning_module.parameters():
            p.zero_()
    assert loaded.validate(loaded.lightning_module, loader(2), verbose=False) == losses[0]


class StopsAfter(Callback):
    """Ends a run that has no end of its own."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.num_steps


def test_endless_run_with_counts_looks_ahead_after_its_warmup() -> None:
    module = Toy(adamw)
    callback = ema_nesterov(warmup=3, rest=0)
    make_trainer([callback, StopsAfter(8)], max_epochs=-1).fit(module, loader(20))
    expected = trajectory_of(Toy(adamw), num_steps=8, step_size=lambda t: 0.5 if t >= 3 else 0.0)
    untreated = trajectory_of(Toy(adamw), num_steps=8, step_size=lambda _: 0.0)
    assert relative_error(snapshot(module), expected[-1]) < 1e-5  # float32 against float64
    assert relative_error(untreated[-1], expected[-1]) > 1e-4


def test_fast_dev_run_needs_no_schedule_that_fits() -> None:
    def run(**kwargs: Any) -> Trainer:
        trainer = make_trainer(EMANesterov(warmup=100, rest=50), **kwargs)
        trainer.fit(Toy(adamw), loader(4))
        return trainer

    assert run(fast_dev_run=True).global_step == 1
    with pytest.raises(MisconfigurationException, match=r"100 \+ 50 steps in a run of 1"):
        run(max_steps=1)


class Boring(BoringModel):
    """Keeps its initial values out of the random numbers that the Trainer draws."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.constant_(self.layer.weight, 0.1)
        nn.init.zeros_(self.layer.bias)

    def train_dataloader(self) -> DataLoader[Tensor]:
        rows = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
        return DataLoader(cast("Dataset[Tensor]", rows))


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_lightning_cli_builds_it_from_yaml(tmp_path: Path) -> None:
    """As made in Python: an int stays a count of steps, a float a fraction."""
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n"
        "  max_steps: 10\n  accelerator: cpu\n  logger: false\n  enable_checkpointing: false\n"
        "  enable_progress_bar: false\n  enable_model_summary: false\n  limit_val_batches: 0\n"
        "  callbacks:\n"
        "  - class_path: lightning_ema_nesterov.EMANesterov\n"
        "    init_args: {lookahead_step_size: 0.3, ema_decay: 0.95, warmup: 1, rest: 0.2}\n"
    )
    args = ["fit", "--config", str(config)]
    cli = LightningCLI(Boring, save_config_callback=None, args=args)
    by_hand, untreated = Boring(), Boring()
    options: dict[str, Any] = {"max_steps": 10, "limit_val_batches": 0}
    callback = EMANesterov(0.3, 0.95, warmup=1, rest=0.2)
    make_trainer(callback, **options).fit(by_hand)
    make_trainer(**options).fit(untreated)
    assert equal(snapshot(cli.model), snapshot(by_hand))
    assert not equal(snapshot(untreated), snapshot(by_hand))


def test_several_optimizers_each_have_a_count_of_their_own() -> None:
    trainer = make_trainer(ema_nesterov(), max_epochs=1)
    trainer.fit(Manual(steps=2), loader(5))
    assert trainer.global_step == 20
    assert [o.param_groups[0][STEP_KEY] for o in trainer.optimizers] == [10, 10]


def test_fit_that_fails_on_its_second_optimizer_leaves_nothing_for_the_next() -> None:
    class Twice(Manual):
        def configure_optimizers(self) -> Any:
            first, _ = super().configure_optimizers()
            return [first, first]

    callback = ema_nesterov()
    with pytest.raises(RuntimeError, match="must have one lookahead method"):
        make_trainer(callback, max_epochs=1).fit(Twice(), loader(5))
    assert callback.lookaheads == ()
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(Manual(), loader(5))
    assert [o.param_groups[0][STEP_KEY] for o in trainer.optimizers] == [5, 5]
