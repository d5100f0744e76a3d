"""What the tests of studies train: a model and data as a stranger would write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ema_nesterov.experiments.event_files import Point
from lightning_ema_nesterov.experiments.study.results import Result
from lightning_ema_nesterov.experiments.study.spec import Run
from tests.toys import Batches, Toy, adamw

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "recipes/studies"
SGD = {"class_path": "SGD", "lrs": [0.1]}


class Model(Toy):
    """The toy as a stranger's model: it diverges where the learning rate is beyond reason."""

    def __init__(self) -> None:
        super().__init__(adamw)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch)
        return loss


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Batches(30), batch_size=None, shuffle=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Batches(3), batch_size=None)


def config(**changes: Any) -> dict[str, Any]:
    return {
        "model": {"class_path": "tests.experiments.toys.Model"},
        "data": {"class_path": "tests.experiments.toys.Data"},
        "num_steps": 20,
        "num_validations": 4,
        "seeds": [0, 1],
        "base_optimizers": {
            "sgd": {"class_path": "SGD", "init_args": {"momentum": 0.9}, "lrs": [0.05, 1e30]},
            "adamw": {
                "class_path": "torch.optim.AdamW",
                "lrs": [0.01],
                "instead": {
                    "free": {"class_path": "schedulefree.AdamWScheduleFree", "lrs": [0.03]}
                },
            },
        },
        "methods": {
            "ema": {"class_path": "EMANesterov", "init_args": {"ema_decay": 0.9}},
            "free": {"class_path": "ScheduleFree", "bases": ["adamw"]},
        },
        **changes,
    }


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(config(**changes), sort_keys=False))
    return path


def environment_with_tests() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}


def write_text(folder: Path, num_files: int) -> Path:
    text = folder / "text"
    text.mkdir()
    for idx in range(num_files):
        (text / f"{idx}.txt").write_text(f"chapter {idx}: the quick brown fox jumps. " * 40)
    return text


def result(method: str, lr: float, seed: int, losses: list[float], **kwargs: Any) -> Result:
    """A result with these validation losses, ten steps and a second apart."""
    points = [Point(10 * (idx + 1), float(idx), loss) for idx, loss in enumerate(losses)]
    values = {"step_seconds": 0.1, "state_per_parameter": 2.0, "step_size": 0.0, **kwargs}
    is_diverged = values.pop("is_diverged", False)
    return Result(Run("sgd", method, lr, seed), points, is_diverged, **values)
