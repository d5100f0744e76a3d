"""Weights & Biases and MLflow, without a network, have the scalars that TensorBoard has."""

from __future__ import annotations

import csv
import json
import math
import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelSummary, RichProgressBar
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)

from tests.toys import Toy, adamw, ema_nesterov, loader, make_trainer

pytest.importorskip("tensorboard", reason="tensorboard is not installed")

Scalars = dict[str, list[tuple[int, float]]]
"""For each tag the steps and their values."""

TAGS = {
    f"ema_nesterov/{tag}"
    for tag in ("step_size", "direction_norm", "displacement_norm", "alignment")
}
STEPS = [1, 3, 5, 7, 9, 11]
BLOCK, FULL, LAST = 32768, 1, 4  # of the log format


def train(*loggers: Logger) -> None:
    trainer = make_trainer(
        [ema_nesterov(warmup=2, rest=3), RichProgressBar(), ModelSummary()],
        max_epochs=1,
        logger=list(loggers),
        log_every_n_steps=2,
        enable_progress_bar=True,
        enable_model_summary=True,
    )
    trainer.fit(Toy(adamw), loader(12))
    for logger in loggers:
        logger.finalize("success")


def of_tensorboard(folder: Path) -> Scalars:
    event_accumulator: Any = import_module("tensorboard.backend.event_processing.event_accumulator")
    [file] = folder.rglob("events.out.*")
    events = event_accumulator.EventAccumulator(str(file)).Reload()
    found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"] if tag in TAGS}
    return {tag: [(e.step, e.value) for e in entries] for tag, entries in found.items()}


def of_csv(folder: Path) -> Scalars:
    [file] = folder.rglob("metrics.csv")
    rows = list(csv.DictReader(file.open()))
    return {
        tag: [(int(row["step"]), float(row[tag])) for row in rows if row.get(tag)] for tag in TAGS
    }


def of_mlflow(logger: MLFlowLogger) -> Scalars:
    found = {tag: logger.experiment.get_metric_history(logger.run_id, tag) for tag in TAGS}
    return {tag: sorted((m.step, m.value) for m in history) for tag, history in found.items()}


def entries_of_log(data: bytes) -> Iterator[bytes]:
    """Yield the entries of a file in the format of LevelDB's logs, behind a header of 7 bytes."""
    position, entry = 7, b""
    while position < len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left  # too short for another header
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        entry += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (FULL, LAST):
            yield entry
            entry = b""


def of_wandb(folder: Path) -> Scalars:
    records: Any = import_module("wandb.proto.wandb_internal_pb2")
    [file] = folder.rglob("*.wandb")
    found: Scalars = {tag: [] for tag in TAGS}
    for data in entries_of_log(file.read_bytes()):
        record = records.Record()
        record.ParseFromString(data)
        row = {
            i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item
        }
        for tag in TAGS & row.keys():
            found[tag].append((row["trainer/global_step"], row[tag]))
    return found


def check_same(actual: Scalars, expected: Scalars) -> None:
    """Assert equality but for float32, in which TensorBoard stores."""
    assert set(actual) == set(expected) == TAGS
    for tag, entries in expected.items():
        assert [step for step, _ in actual[tag]] == [step for step, _ in entries] == STEPS
        values = [value for _, value in actual[tag]]
        assert values == pytest.approx([value for _, value in entries], rel=1e-6)
        assert len(set(values)) > 1
        assert all(math.isfinite(value) for value in values)


def test_csv_beside_tensorboard_a_rich_progress_bar_and_a_summary(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    caplog.set_level("INFO", logger="lightning.pytorch")
    train(TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv"))
    check_same(of_csv(tmp_path / "csv"), of_tensorboard(tmp_path / "tb"))
    assert "| hidden | Linear | 32" in caplog.text


@pytest.mark.slow
def test_mlflow_has_the_same_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlflow'}")
    train(TensorBoardLogger(tmp_path / "tb"), logger)
    check_same(of_mlflow(logger), of_tensorboard(tmp_path / "tb"))


@pytest.mark.slow
def test_wandb_has_the_same_scalars(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    logger = WandbLogger(save_dir=tmp_path / "wandb", offline=True)
    train(TensorBoardLogger(tmp_path / "tb"), logger)
    wandb.finish()
    check_same(of_wandb(tmp_path / "wandb"), of_tensorboard(tmp_path / "tb"))
