"""The share of slow movement: what is logged, and that looking changes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

from lightning_ema_nesterov.diagnostics import TrajectorySpectrum
from lightning_ema_nesterov.experiments.event_files import read_scalars
from tests.toys import Toy, adamw, ema_nesterov, equal, loader, make_trainer, sgd, snapshot


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


class Kept(CSVLogger):
    """Keeps the values that it is given."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.values: list[float] = []

    def log_metrics(self, metrics: Mapping[str, Tensor | float], step: int | None = None) -> None:
        self.values.extend(float(value) for value in metrics.values())


def slow_share(gradients: Tensor, folder: Path, **kwargs: Any) -> list[float]:
    logger = Kept(folder)
    spectrum = TrajectorySpectrum(frequency=0.05, window=100, **kwargs)
    trainer = make_trainer(spectrum, max_steps=len(gradients), logger=logger)
    trainer.fit(Moved(gradients), loader(len(gradients)))
    return logger.values


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
