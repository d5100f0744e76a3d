"""Event files in, scalars out; tables for a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_ema_nesterov.experiments.event_files import read_scalar
from lightning_ema_nesterov.experiments.tables import format_table


def test_scalars_come_back_from_event_files(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "run", version="")
    for step, value in ((49, 2.5), (99, 2.25)):
        logger.log_metrics({"val_loss": value}, step)
    logger.finalize("success")
    points = read_scalar(tmp_path / "run", "val_loss")
    assert [(point.step, point.value) for point in points] == [(50, 2.5), (100, 2.25)]
    assert 0 <= points[0].seconds <= points[1].seconds < 60
    with pytest.raises(FileNotFoundError, match="must hold event files with the scalar 'loss'"):
        read_scalar(tmp_path / "run", "loss")


def test_table_columns_are_aligned() -> None:
    table = format_table([["run", "loss"], ["a", "10.25"], ["longer", "9"]])
    assert table.splitlines() == [
        "run      loss",
        "------  -----",
        "a       10.25",
        "longer      9",
    ]
