"""Other callbacks of Lightning beside it: averages, finetuning, tuners, accumulation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_ema_nesterov.core.progress import STEP_KEY
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.core import reference
from tests.toys import (
    Batches,
    Recorder,
    Toy,
    adamw,
    batch_gradients,
    ema_directions,
    ema_nesterov,
    equal,
    loader,
    make_trainer,
    relative_error,
    snapshot,
    trajectory_of,
)
from tests.versions import EMAWeightAveraging, is_older_lightning


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_weight_averaging_averages_iterates(kind: str, is_first: bool) -> None:
    """The average is that of the recorded iterates, in either order of the callbacks."""
    averaging: Callback = (
        EMAWeightAveraging(decay=0.5)
        if kind == "ema"
        else StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2, annealing_epochs=1)
    )
    recorder, callback, module = Recorder("on_train_batch_end"), ema_nesterov(), Toy(adamw)
    order = [callback, averaging] if is_first else [averaging, callback]
    make_trainer([*order, recorder], max_epochs=5).fit(module, loader(6), loader(1))
    weights = [[p.double() for p in params] for params in recorder.params]
    if kind == "ema":
        expected = weights[0]
        for params in weights[1:]:
            expected = [0.5 * a + 0.5 * b for a, b in zip(expected, params, strict=True)]
    else:
        ends = weights[5:29:6]  # what the epochs 1 to 4 start from
        expected = [torch.stack(ps).mean(0) for ps in zip(*ends, strict=True)]
    assert relative_error(snapshot(module), expected) < 1e-5  # float32 averages
    assert relative_error(snapshot(module), weights[-1]) > 1e-4


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_batch_norm_epoch_of_swa_runs_at_the_average() -> None:
    class WithBatchNorm(Toy):
        def __init__(self) -> None:
            super().__init__(adamw)
            self.norm = nn.BatchNorm1d(4)
            self.in_update: list[list[Tensor]] = []

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if self.trainer.current_epoch == 3:  # one more than was asked for
                self.in_update.append(snapshot(self))
            return self.forward(torch.cat([self.norm(batch[:, :4]), batch[:, 4:]], dim=1))

    module, recorder = WithBatchNorm(), Recorder("on_train_epoch_start")
    swa = StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    make_trainer([swa, ema_nesterov(), recorder], max_epochs=3).fit(module, loader(4))
    starts = recorder.params[:3]
    average = [torch.stack(ps).mean(0) for ps in zip(*starts, strict=True)]
    assert len(module.in_update) == 4
    for params in module.in_update:
        assert relative_error(params, average) < 1e-6  # float32 averages
    assert relative_error(starts[-1], average) > 1e-3


def test_parameters_that_finetuning_adds_later_get_a_direction_of_their_own() -> None:
    class Finetuned(Toy):
        def __init__(self) -> None:
            super().__init__(adamw)
            self.backbone = self.hidden

        def configure_optimizers(self) -> Any:
            return adamw([p for p in self.parameters() if p.requires_grad])

    module, recorder = Finetuned(), Recorder("on_train_start", "on_train_batch_end")
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    trainer = make_trainer([finetuning, ema_nesterov(), recorder], max_epochs=3)
    trainer.fit(module, loader(4))
    iterates = recorder.params
    expected = ema_directions(iterates)[-1]
    state = trainer.optimizers[0].state
    for p, m in zip(module.parameters(), expected, strict=True):
        # Displacements are a few thousandths of the parameters, which are rounded to float32.
        assert relative_error([state[p][DIRECTION_KEY]], [m]) < 1e-3
    assert torch.equal(iterates[0][0], iterates[4][0])  # frozen in the first epoch
    assert not torch.equal(iterates[4][0], iterates[5][0])


class Tunable(Toy):
    """Has a learning rate that a search can set."""

    def __init__(self, lr: float = 1e-4) -> None:
        super().__init__(adamw)
        self.lr = lr

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("is_first", [False, True])
def test_learning_rate_finder_leaves_a_fresh_run(is_first: bool, tmp_path: Path) -> None:
    """The search runs without lookahead; the reference is the learning rate that it found."""
    module, callback, recorder = Tunable(), ema_nesterov(), Recorder("on_train_start")
    finder = LearningRateFinder(num_training_steps=20)
    order = [callback, finder] if is_first else [finder, callback]
    trainer = make_trainer(
        [*order, recorder], max_steps=5, default_root_dir=tmp_path, enable_checkpointing=True
    )
    trainer.fit(module, loader(30))
    assert equal(recorder.params[0], snapshot(Tunable()))
    assert module.lr != 1e-4
    if is_older_lightning() and trainer.optimizers[0].param_groups[0]["lr"] != module.lr:
        pytest.skip("this Lightning does not give the optimizer the learning rate that it found")
    found = Toy(lambda params: torch.optim.AdamW(params, lr=module.lr))
    expected = trajectory_of(found, num_steps=5)[-1]
    untreated = trajectory_of(found, num_steps=5, step_size=lambda _: 0.0)[-1]
    # float32 against float64; a search that counted steps or left a direction would show.
    assert relative_error(snapshot(module), expected) < 1e-5
    assert relative_error(untreated, expected) > 1e-4
    assert trainer.optimizers[0].param_groups[0][STEP_KEY] == 5


class SearchesInTheSecondEpoch(LearningRateFinder):
    def on_fit_start(self, *args: Any) -> None:
        """Lightning would search here."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            before = snapshot(pl_module)
            self.lr_find(trainer, pl_module)
            assert equal(before, snapshot(pl_module))


def test_learning_rate_search_in_the_middle_of_training_restores_everything(tmp_path: Path) -> None:
    """The steps of the oracle, though the search took one of its own in between."""

    class Counts(Tunable):
        num_batches = 0

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.num_batches += 1
            return self.forward(batch)

    module = Counts(lr=1e-2)
    trainer = make_trainer(
        [SearchesInTheSecondEpoch(num_training_steps=10), ema_nesterov()],
        max_epochs=4,
        default_root_dir=tmp_path,
        enable_checkpointing=True,
    )
    trainer.fit(module, loader(6))
    assert module.num_batches > 24
    assert trainer.optimizers[0].param_groups[0][STEP_KEY] == 24
    expected, _ = reference.train(
        snapshot(Toy(adamw)),
        batch_gradients(module, Batches(6, torch.float64).data.repeat(4, 1, 1)),
        adamw,
        num_steps=24,
        ema_decay=0.9,
        step_size=lambda _: 0.5,
    )
    assert relative_error(snapshot(module), expected[24]) < 1e-5  # float32 against float64
    assert relative_error(expected[24], expected[6]) > 1e-3


def test_batch_size_finder_leaves_a_fresh_run(tmp_path: Path) -> None:
    class Sized(Toy):
        def __init__(self) -> None:
            super().__init__(adamw)
            self.batch_size = 2

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.forward(batch[0])

        def train_dataloader(self) -> Any:
            rows = TensorDataset(Batches(64).data[:, 0])
            return DataLoader(rows, batch_size=self.batch_size)

        def val_dataloader(self) -> Any:
            return loader(1)

    module, recorder = Sized(), Recorder("on_train_start")
    trainer = make_trainer(
        [ema_nesterov(), BatchSizeFinder(max_trials=2, steps_per_trial=2), recorder],
        max_epochs=1,
        default_root_dir=tmp_path,
        enable_checkpointing=True,
    )
    trainer.fit(module)
    assert module.batch_size > 2
    assert equal(recorder.params[0], snapshot(Sized()))
    assert trainer.optimizers[0].param_groups[0][STEP_KEY] == trainer.global_step
    assert trainer.global_step == -(-64 // module.batch_size)


def size_before(end: int, t: int) -> float:
    return 0.5 if t < end else 0.0


def test_rest_counts_the_steps_of_each_epoch_of_an_accumulation_scheduler() -> None:
    """8 + 2 + 2 steps: a rest of a quarter is the last three of them."""
    module, recorder = Toy(adamw), Recorder("on_train_batch_end")
    scheduler = GradientAccumulationScheduler({0: 1, 1: 4})
    make_trainer([scheduler, ema_nesterov(rest=0.25), recorder], max_epochs=3).fit(
        module, loader(8)
    )
    data = Batches(8, torch.float64).data
    single, windows = (
        batch_gradients(module, data),
        batch_gradients(module, data.repeat(2, 1, 1), 4),
    )

    def gradients(params: list[Tensor], step_idx: int) -> Any:
        return single(params, step_idx) if step_idx < 8 else windows(params, step_idx - 8)

    expected, never_rested = (
        reference.train(
            snapshot(Toy(adamw)),
            gradients,
            adamw,
            num_steps=12,
            ema_decay=0.9,
            step_size=partial(size_before, end),
        )[0]
        for end in (9, 12)
    )
    for _, step, params in recorder.seen:
        assert relative_error(params, expected[step]) < 1e-5  # float32 against float64
    assert relative_error(never_rested[-1], expected[-1]) > 1e-3
