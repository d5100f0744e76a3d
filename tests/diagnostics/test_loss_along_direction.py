"""The loss along the direction: what is logged, and that looking changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.func import functional_call

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.diagnostics import LossAlongDirection
from lightning_ema_nesterov.experiments.data import TextWindows
from lightning_ema_nesterov.experiments.event_files import read_scalars
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.experiments.plain_loop import ByteLanguageModel
from tests.toys import Batches, Toy, adamw, ema_nesterov, equal, loader, make_trainer, snapshot


class Watch(Callback):
    """Keeps the iterate and the direction at each validation."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[Tensor], list[Tensor]]] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = trainer.optimizers[0].state
        directions = [state[p][DIRECTION_KEY].clone() for p in pl_module.parameters() if p in state]
        self.seen.append((snapshot(pl_module), directions))


class Talkative(Toy):
    """Logs in its training step, as most do, and behaves otherwise in evaluation mode."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.forward(batch) * (1.0 if self.training else 2.0)
        self.log("loss", loss)
        return loss


def test_loss_along_the_direction_is_that_at_the_moved_point(tmp_path: Path) -> None:
    def run(callbacks: list[Callback]) -> list[Tensor]:
        model = Talkative(adamw)
        trainer = make_trainer(
            [ema_nesterov(), *callbacks],
            max_steps=8,
            val_check_interval=4,
            logger=TensorBoardLogger(tmp_path, "", version=""),
            log_every_n_steps=1,
        )
        trainer.fit(model, loader(8), loader(3))
        return snapshot(model)

    watch = Watch()
    final = run([watch, LossAlongDirection((0.5, 4.0), num_batches=2)])
    scalars = read_scalars(tmp_path)
    model, batches = Toy(adamw), Batches(3).data[:2]
    for a in (0.5, 4.0):
        points = scalars[f"ema_nesterov/loss_along/a={a:g}"]
        assert [point.step for point in points] == [4, 8]
        for point, (iterates, directions) in zip(points, watch.seen, strict=True):
            losses = []
            for distance in (0.0, a):
                moved = [x + distance * m for x, m in zip(iterates, directions, strict=True)]
                named = dict(zip(dict(model.named_parameters()), moved, strict=True))
                values = [2.0 * functional_call(model, named, (batch,)) for batch in batches]
                losses.append(float(torch.stack(values).mean()))
            assert point.value == pytest.approx(losses[1] - losses[0], abs=1e-6)
            assert abs(point.value) > 1e-5
    assert len(scalars["loss"]) == 8  # none of its own
    assert equal(final, run([]))


@pytest.mark.slow
@pytest.mark.no_cover
def test_one_step_direction_climbs_and_the_ema_direction_hardly_does(tmp_path: Path) -> None:
    """On the quickstart's model and data, over ten steps' worth of the direction."""

    def climbs(ema_decay: float) -> list[float]:
        torch.manual_seed(0)
        folder = tmp_path / str(ema_decay)
        trainer = make_trainer(
            [EMANesterov(0.5, ema_decay), LossAlongDirection((10.0,))],
            max_steps=150,
            val_check_interval=50,
            logger=TensorBoardLogger(folder, "", version=""),
        )
        model = ByteLanguageModel(2e-3, 150, window_size=64)
        trainer.fit(model, datamodule=TextWindows(num_validation_windows=128))
        return [p.value for p in read_scalars(folder)["ema_nesterov/loss_along/a=10"]]

    one_step, ema = climbs(0.0), climbs(0.99)
    assert len(one_step) == len(ema) == 3
    # The third is the end of the rest: hardly any learning rate is left to make a step with.
    assert min(one_step[:2]) > 0.1
    assert max(ema[:2]) < 0.1 * min(one_step[:2])
    assert abs(one_step[2]) < 0.1 * min(one_step[:2])
    assert ema[0] < 0


def test_direction_and_arguments_of_the_loss_along_it_are_checked() -> None:
    with pytest.raises(MisconfigurationException, match="needs the direction of an EMANesterov"):
        make_trainer(LossAlongDirection(), max_steps=1).fit(Toy(adamw), loader(1))
    with pytest.raises(ValueError, match="distances must not be empty"):
        LossAlongDirection(())
    with pytest.raises(ValueError, match="num_batches must be at least 1"):
        LossAlongDirection(num_batches=0)
