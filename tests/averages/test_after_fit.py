"""Validation, test and prediction at the average outside of fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ema_nesterov.trainer.questions import callbacks_of
from tests.toys import Batches, Toy, adamw, ema_nesterov, equal, loader, make_trainer, snapshot


class Evaluated(Toy):
    """Notes the parameters that each kind of evaluation sees."""

    batch_size = 2
    saves_to: Path | None = None

    def __init__(self) -> None:
        super().__init__(adamw)
        self.seen: dict[str, list[Tensor]] = {}

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.seen["validate"] = snapshot(self)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self(batch))
        if self.saves_to is not None:
            self.trainer.save_checkpoint(self.saves_to)
        self.seen["test"] = snapshot(self)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen["predict"] = snapshot(self)
        loss: Tensor = self(batch)
        return loss

    def val_dataloader(self) -> Any:
        rows: Any = Batches(8).data[:, 0]
        return DataLoader(rows, batch_size=self.batch_size)


def fitted(folder: Path, **kwargs: Any) -> tuple[Evaluated, Trainer, list[Tensor]]:
    module = Evaluated()
    checkpoint = ModelCheckpoint(folder, filename="last")
    callback = ema_nesterov(evaluate_at="average", **kwargs)
    trainer = make_trainer([callback, checkpoint], max_epochs=1, enable_checkpointing=True)
    trainer.fit(module, loader(12), loader(2))
    average = module.seen.pop("validate")
    assert not torch.allclose(average[0], snapshot(module)[0], rtol=1e-2)
    return module, trainer, average


def evaluate(trainer: Trainer, module: Evaluated, **kwargs: Any) -> dict[str, list[Tensor]]:
    module.seen.clear()
    trainer.validate(module, loader(2), verbose=False, **kwargs)
    trainer.test(module, loader(2), verbose=False, **kwargs)
    trainer.predict(module, loader(2), **kwargs)
    return module.seen


@pytest.mark.parametrize("direction_dtype", ["float32", "bfloat16"])
def test_after_fit_every_evaluation_sees_the_average(tmp_path: Path, direction_dtype: str) -> None:
    module, trainer, average = fitted(tmp_path, direction_dtype=direction_dtype)
    x = snapshot(module)
    seen = evaluate(trainer, module)
    assert set(seen) == {"validate", "test", "predict"}
    for params in seen.values():
        assert equal(params, average)
    assert equal(snapshot(module), x)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=False)
    assert equal([*saved["state_dict"].values()], x)


def test_a_checkpoint_is_evaluated_at_its_average(tmp_path: Path) -> None:
    module, _, average = fitted(tmp_path)
    x = snapshot(module)
    fresh = Evaluated()
    trainer = make_trainer(ema_nesterov(evaluate_at="average", average_share=1.0))
    options = {"ckpt_path": tmp_path / "last.ckpt", "weights_only": False}
    for params in evaluate(trainer, fresh, **options).values():
        torch.testing.assert_close(params, average, rtol=1e-6, atol=1e-7)
    assert equal(snapshot(fresh), x)


def test_the_checkpoint_counts_and_not_what_was_trained(tmp_path: Path) -> None:
    module, trainer, average = fitted(tmp_path)
    more = make_trainer(ema_nesterov(evaluate_at="average"), max_epochs=3)
    more.fit(module, loader(12))
    assert not equal(snapshot(module), average)
    options = {"ckpt_path": tmp_path / "last.ckpt", "weights_only": False}
    for params in evaluate(more, module, **options).values():
        torch.testing.assert_close(params, average, rtol=1e-6, atol=1e-7)
    assert trainer.global_step == 12


@pytest.mark.parametrize("is_given", [True, False])
def test_a_checkpoint_in_the_middle_of_a_test_holds_the_iterate(
    tmp_path: Path, is_given: bool
) -> None:
    module, trainer, average = fitted(tmp_path)
    x = snapshot(module)
    options: dict[str, Any] = {}
    if is_given:
        module, trainer = Evaluated(), make_trainer(ema_nesterov(evaluate_at="average"))
        options = {"ckpt_path": tmp_path / "last.ckpt", "weights_only": False}
    module.saves_to = tmp_path / "test.ckpt"
    trainer.test(module, loader(2), verbose=False, **options)
    saved = torch.load(module.saves_to, weights_only=False)
    assert equal([*saved["state_dict"].values()], x)
    torch.testing.assert_close(module.seen["test"], average, rtol=1e-6, atol=1e-7)
    assert equal(snapshot(module), x)


@pytest.mark.parametrize("is_given", [True, False])
def test_the_batch_size_finder_keeps_the_average(tmp_path: Path, is_given: bool) -> None:
    module, trainer, average = fitted(tmp_path)
    x = snapshot(module)
    callback = callbacks_of(trainer)[0]
    options: dict[str, Any] = {}
    if is_given:
        module, callback = Evaluated(), ema_nesterov(evaluate_at="average")
        options = {"ckpt_path": tmp_path / "last.ckpt", "weights_only": False}
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=1)
    make_trainer(
        [callback, finder],
        default_root_dir=tmp_path,
        enable_checkpointing=True,
    ).validate(module, verbose=False, **options)
    assert module.batch_size > 2
    torch.testing.assert_close(module.seen["validate"], average, rtol=1e-6, atol=1e-7)
    assert equal(snapshot(module), x)


def test_without_an_average_the_weights_are_taken_and_that_is_said(tmp_path: Path) -> None:
    module = Evaluated()
    x = snapshot(module)
    trainer = make_trainer(ema_nesterov(evaluate_at="average"))
    with pytest.warns(UserWarning, match="has no average of these weights"):
        seen = evaluate(trainer, module)
    assert all(equal(params, x) for params in seen.values())
    plain = make_trainer(max_epochs=1)
    plain.fit(module, loader(4))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(MisconfigurationException, match="must be made with EMA-Nesterov"):
        evaluate(trainer, module, ckpt_path=tmp_path / "plain.ckpt", weights_only=False)
