"""Event files in, tables and figures out."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_ema_nesterov.experiments.event_files import (
    Point,
    compare,
    draw_curves,
    format_table,
    read_scalar,
)

BASELINE = [Point(100, 10.0, 3.0), Point(200, 20.0, 1.9), Point(300, 30.0, 2.0)]


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


def test_comparison_finds_when_the_baseline_is_reached() -> None:
    other = [Point(100, 11.0, 2.5), Point(200, 22.0, 2.0), Point(300, 33.0, 1.8)]
    result = compare(BASELINE, other)
    assert (result.baseline_final, result.baseline_best) == (2.0, 1.9)
    assert (result.final, result.best) == (1.8, 1.8)
    assert (result.steps_to_baseline_final, result.seconds_to_baseline_final) == (200, 22.0)
    assert (result.baseline_steps, result.baseline_seconds) == (300, 30.0)


def test_comparison_says_never() -> None:
    result = compare(BASELINE, [Point(100, 11.0, 2.5)])
    assert result.steps_to_baseline_final is None
    assert result.seconds_to_baseline_final is None


def test_table_columns_are_aligned() -> None:
    table = format_table([["run", "loss"], ["a", "10.25"], ["longer", "9"]])
    assert table.splitlines() == [
        "run      loss",
        "------  -----",
        "a       10.25",
        "longer      9",
    ]


@pytest.mark.parametrize("lookahead", [[], [Point(100, 0.0, 0.0), Point(200, 0.0, 0.5)]])
def test_picture_is_a_png_of_both_curves(lookahead: list[Point], tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    draw_curves(path, BASELINE, BASELINE, labels=("a", "b"), lookahead=lookahead, title="t")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000
