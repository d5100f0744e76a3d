"""RelativeDirection logs what the optimizer's state says, and asks for its neighbour."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.diagnostics.relative_direction import RelativeDirection

TAG = "ema_nesterov/relative_direction"


def make_trainer(folder: Path, *callbacks: Any) -> Trainer:
    return Trainer(
        max_epochs=1,
        limit_train_batches=6,
        limit_val_batches=0,
        callbacks=[*callbacks],
        logger=CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )


@pytest.mark.filterwarnings("ignore")
def test_it_logs_the_ratio_of_the_norms(tmp_path: Path) -> None:
    module = BoringModel()
    trainer = make_trainer(tmp_path, EMANesterov(ema_decay=0.5, rest=0), RelativeDirection())
    trainer.fit(module)
    state = trainer.optimizers[0].state
    directions = [state[p]["ema_nesterov_direction"].flatten() for p in module.parameters()]
    points = [p.detach().flatten() for p in module.parameters()]
    expected = torch.cat(directions).norm() / torch.cat(points).norm()
    [path] = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(path.open()))
    [value] = [row[TAG] for row in rows if row.get(TAG)]
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert float(value) > 0


@pytest.mark.filterwarnings("ignore")
def test_without_a_direction_it_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="needs an EMANesterov callback"):
        make_trainer(tmp_path, RelativeDirection()).fit(BoringModel())
