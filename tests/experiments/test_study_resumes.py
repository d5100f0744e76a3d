"""A run of a study that was stopped in the middle goes on as if it had not been."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_ema_nesterov.experiments.study import train
from lightning_ema_nesterov.experiments.study.load import load_study
from lightning_ema_nesterov.experiments.study.results import read_event_folder
from lightning_ema_nesterov.experiments.study.spec import ClassSpec, Run, Study
from lightning_ema_nesterov.experiments.study.watch import Watch
from lightning_ema_nesterov.experiments.tokens import TokenWindows
from tests.experiments.toys import SGD, Model, write, write_text

RUN = Run("adamw", "ema", 0.01, 0)


def token_study(folder: Path) -> Study:
    experiments = "lightning_ema_nesterov.experiments"
    data = {
        "text": str(write_text(folder, 20)),
        "cache_dir": str(folder / "tokens"),
        "vocab_size": 300,
        "window_size": 8,
        "batch_size": 2,
        "num_validation_windows": 4,
    }
    return load_study(
        write(
            folder,
            model={
                "class_path": f"{experiments}.model.ByteDecoder",
                "init_args": {"window_size": 8, "num_layers": 1, "width": 16, "vocab_size": 300},
            },
            data={"class_path": f"{experiments}.tokens.TokenWindows", "init_args": data},
            base_optimizers={"adamw": {"class_path": "AdamW", "lrs": [0.01]}},
            methods={"ema": {"class_path": "EMANesterov", "init_args": {"ema_decay": 0.9}}},
            average_shares=[1.0],
            accumulate_grad_batches=2,
            precision="bf16-mixed",
            has_checkpoints=True,
            num_steps=12,
            num_validations=4,
        )
    )


class Stops(Callback):
    """Ends the run a step after a validation, as a time limit would."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object
    ) -> None:
        if trainer.global_step == 7:
            raise KeyboardInterrupt


def begin(study: Study, run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train the first seven steps of a run."""
    make = train._make_trainer

    def make_with_stop(*args: object, **kwargs: object) -> Trainer:
        trainer = make(*args, **kwargs)  # type: ignore[arg-type]  # passed on
        trainer.callbacks.append(Stops())  # type: ignore[attr-defined]  # set elsewhere
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(train, "_make_trainer", make_with_stop)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train.train_run(study, run, root)
    checkpoint = root / run.folder / train.CHECKPOINT
    assert torch.load(checkpoint, weights_only=False)["global_step"] == 6


def small_study(folder: Path, momentum: float = 0.9) -> Study:
    sgd = {**SGD, "init_args": {"momentum": momentum}}
    changes = {
        "num_steps": 12,
        "has_checkpoints": True,
        "methods": {"snoo": {"class_path": "SNOO"}},
    }
    return load_study(write(folder, base_optimizers={"sgd": sgd}, **changes))


SMALL_RUN = Run("sgd", "none", 0.1, 0)


def test_unfinished_run_of_another_optimizer_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    begin(small_study(tmp_path), SMALL_RUN, root, monkeypatch)
    other = small_study(tmp_path, momentum=0.0)
    train.train_run(other, SMALL_RUN, root)
    train.train_run(other, SMALL_RUN, tmp_path / "fresh")
    found, expected = (
        read_event_folder(folder / SMALL_RUN.folder) for folder in (root, tmp_path / "fresh")
    )
    assert [(p.step, p.value) for p in found.val_loss] == [
        (p.step, p.value) for p in expected.val_loss
    ]
    assert found.state_per_parameter == expected.state_per_parameter == 0.0
    names = {path.name.split(".")[0] for path in (root / SMALL_RUN.folder).iterdir()}
    assert names == {"events", "hparams"}


def test_run_that_was_killed_at_its_end_has_its_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*args: object) -> None:
        raise KeyboardInterrupt

    study = small_study(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "write", kill)
        with pytest.raises(KeyboardInterrupt):
            train.train_run(study, SMALL_RUN, tmp_path / "killed")
    for name in ("killed", "whole"):
        train.train_run(study, SMALL_RUN, tmp_path / name)
    killed, whole = (
        read_event_folder(tmp_path / name / SMALL_RUN.folder) for name in ("killed", "whole")
    )
    assert not killed.is_diverged
    assert killed.final == whole.final
    assert [p.step for p in killed.val_loss] == [3, 6, 9, 12]


class Silent(Model):
    """Logs no ``val_loss``."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        return


def test_model_without_val_loss_is_named(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    silent = replace(study, model=ClassSpec(f"{__name__}.Silent"))
    with pytest.raises(ValueError, match="model must log val_loss in validation, and Silent did"):
        train.train_run(silent, SMALL_RUN, tmp_path)


@pytest.mark.slow
def test_interrupted_run_goes_on_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = token_study(tmp_path)
    train.train_run(study, RUN, tmp_path / "whole")
    begin(study, RUN, tmp_path / "pieces", monkeypatch)
    train.train_run(study, RUN, tmp_path / "pieces")
    assert not (tmp_path / "pieces" / RUN.folder / train.CHECKPOINT).exists()
    whole, pieces = (
        read_event_folder(tmp_path / name / RUN.folder) for name in ("whole", "pieces")
    )
    for found, expected in (
        (pieces.val_loss, whole.val_loss),
        (pieces.at_average[1.0], whole.at_average[1.0]),
    ):
        assert [p.step for p in expected] == [3, 6, 9, 12]
        assert [(p.step, p.value) for p in found] == [(p.step, p.value) for p in expected]
    assert len({p.value for p in whole.val_loss}) == 4
    other = replace(study, accumulate_grad_batches=1)
    train.train_run(other, RUN, tmp_path / "other")
    assert read_event_folder(tmp_path / "other" / RUN.folder).final != whole.final


def test_tokens_are_those_of_the_text(tmp_path: Path) -> None:
    """Byte-level: decoded they are the text again, and they are encoded once."""
    text = write_text(tmp_path, 20)
    make = partial(
        TokenWindows,
        str(text),
        cache_dir=str(tmp_path / "tokens"),
        vocab_size=300,
        window_size=8,
        batch_size=2,
    )
    data, again = make(), make()
    data.setup("fit")
    [path] = (tmp_path / "tokens").iterdir()
    written = path.stat().st_mtime_ns
    again.setup("fit")
    assert path.stat().st_mtime_ns == written
    assert torch.equal(data.corpus.train, again.corpus.train)
    assert int(data.corpus.train.numpy().max()) < 300
    smaller = make(vocab_size=280)
    smaller.setup("fit")
    assert int(smaller.corpus.train.numpy().max()) < 280
    assert len(data.corpus.train) < sum(p.stat().st_size for p in text.iterdir()) / 1.2
    batch = next(iter(data.train_dataloader()))
    assert batch.shape == (2, 9)
    tokens = data.corpus.train.numpy().astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, 9)
    assert all((windows == row.numpy()).all(axis=1).any() for row in batch)
    with pytest.raises(ValueError, match=r"longer than one window of 3000 tokens"):
        TokenWindows(
            str(text), cache_dir=str(tmp_path / "tokens"), vocab_size=300, window_size=3000
        ).setup("fit")
    with pytest.raises(ValueError, match=r"vocab_size must be in \[257, 65536\], got 256"):
        TokenWindows(vocab_size=256)
