"""Event files in, scalars out; tables for a terminal."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger

from lightning_ema_nesterov.experiments.event_files import read_scalars
from lightning_ema_nesterov.experiments.tables import format_table


def test_scalars_come_back_from_event_files(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "run", version="")
    for step, value in ((49, 2.5), (99, 2.25)):
        logger.log_metrics({"val_loss": value}, step)
    logger.finalize("success")
    scalars = read_scalars(tmp_path / "run")
    assert set(scalars) == {"val_loss"}
    points = scalars["val_loss"]
    assert [(point.step, point.value) for point in points] == [(50, 2.5), (100, 2.25)]
    assert 0 <= points[0].seconds <= points[1].seconds < 60


def test_table_columns_are_aligned() -> None:
    table = format_table([["run", "loss"], ["a", "10.25"], ["longer", "9"]])
    assert table.splitlines() == [
        "run      loss",
        "------  -----",
        "a       10.25",
        "longer      9",
    ]
