"""What the diagnostics log, and that looking changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.func import functional_call

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.diagnostics import LossAlongDirection, TrajectorySpectrum
from lightning_ema_nesterov.experiments.data import TextWindows
from lightning_ema_nesterov.experiments.event_files import read_scalars
from lightning_ema_nesterov.experiments.model import ByteLanguageModel
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.toys import Batches, Toy, adamw, ema_nesterov, equal, loader, make_trainer, sgd, snapshot


class Watch(Callback):
    """Keeps the iterate and the direction at each validation."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[Tensor], list[Tensor]]] = []

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        state = trainer.optimizers[0].state
        directions = [state[p][DIRECTION_KEY].clone() for p in pl_module.parameters() if p in state]
        self.seen.append((snapshot(pl_module), directions))


class Talkative(Toy):
    """Logs in its training step, as most do, and behaves otherwise in evaluation mode."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch) * (1.0 if self.training else 2.0)
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
    assert len(one_step) == len(ema) == 2  # none in the rest
    assert min(one_step) > 0.1
    assert max(ema) < 0.1 * min(one_step)
    assert ema[0] < 0


def test_loss_along_needs_a_direction_and_a_loss(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="needs the direction of an EMANesterov"):
        make_trainer(LossAlongDirection(), max_steps=1).fit(Toy(adamw), loader(1))
    with pytest.raises(ValueError, match="distances must not be empty"):
        LossAlongDirection(())
    with pytest.raises(ValueError, match="num_batches at least 1"):
        LossAlongDirection(num_batches=0)


class Moved(Toy):
    """A parameter that the gradients given move."""

    def __init__(self, gradients: Tensor) -> None:
        super().__init__(sgd)
        self.gradients = gradients
        self.line = nn.Parameter(torch.zeros(50))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.line * self.gradients[batch_idx]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.line], lr=0.1)


def slow_share(gradients: Tensor, folder: Path, **kwargs: Any) -> list[float]:
    num_steps = len(gradients)
    trainer = make_trainer(
        TrajectorySpectrum(frequency=0.05, window=100, **kwargs),
        max_steps=num_steps,
        logger=CSVLogger(folder),
    )
    values: list[float] = []
    trainer.logger.log_metrics = lambda scalars, step: values.extend(scalars.values())  # type: ignore[method-assign]
    trainer.fit(Moved(gradients), loader(num_steps))
    return values


def test_share_of_slow_movement_is_that_of_the_gradients(tmp_path: Path) -> None:
    steps = torch.arange(301.0)[:, None]
    constant = torch.ones(301, 50)
    assert slow_share(constant, tmp_path) == pytest.approx([1.0] * 3)
    # Up and down again: all energy at the highest frequency.
    assert slow_share(constant * (1 - 2 * (steps % 2)), tmp_path) == pytest.approx(
        [0.0] * 3, abs=1e-6
    )
    # 3 cycles in the window are below 0.05 a step, 8 are above.
    for cycles, share in ((3, 1.0), (8, 0.0)):
        wave = torch.sin(2 * math.pi * cycles * steps / 100) * constant
        assert slow_share(wave, tmp_path) == pytest.approx([share] * 3, abs=1e-5)
    # Noise: frequencies 0 to 5 of 0 to 50, so 11 of 100.
    noise = torch.randn(301, 50, generator=torch.Generator().manual_seed(0))
    shares = slow_share(noise, tmp_path, num_projections=64)
    assert sum(shares) / 3 == pytest.approx(0.11, abs=0.03)


def test_spectrum_counts_optimizer_steps_and_changes_nothing(tmp_path: Path) -> None:
    def run(callbacks: list[Callback]) -> list[Tensor]:
        torch.manual_seed(0)
        model = Toy(adamw)
        trainer = make_trainer(
            [ema_nesterov(), *callbacks],
            max_steps=12,
            accumulate_grad_batches=2,
            logger=TensorBoardLogger(tmp_path, "", version=""),
        )
        trainer.fit(model, loader(24))
        return [*snapshot(model), torch.rand(3)]

    spectrum = TrajectorySpectrum(frequency=0.2, window=5)
    with_spectrum = run([spectrum])
    points = read_scalars(tmp_path)["ema_nesterov/slow_share"]
    assert [point.step for point in points] == [6, 11]
    assert all(0.0 < point.value < 1.0 for point in points)
    assert equal(with_spectrum, run([]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"frequency": 0.5}, r"frequency must be in \(0, 0.5\), got 0.5"),
        ({"frequency": 0.01, "window": 99}, "window must be at least 100 steps, got 99"),
        ({"num_projections": 0}, "must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrajectorySpectrum(**kwargs)
