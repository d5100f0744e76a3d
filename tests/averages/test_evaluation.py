"""Validation at the average, against an average of the iterates that is kept by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_ema_nesterov import EMANesterov
from tests.toys import Toy, adamw, ema_nesterov, equal, loader, make_trainer, snapshot
from tests.versions import EMAWeightAveraging

Point = Literal["iterate", "average"]


class Evaluated(Toy):
    """Notes the parameters that each validation sees."""

    def __init__(self) -> None:
        super().__init__(adamw)
        self.seen: list[list[Tensor]] = []

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 0:
            self.seen.append(snapshot(self))


class Average(Callback):
    """The average of the iterates in float64, and what others see after a validation."""

    def __init__(self) -> None:
        self.average: list[Tensor] = []
        self.at_validation: list[list[Tensor]] = []
        self.after: list[list[Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.average = [x.double() for x in snapshot(pl_module)]
        self.last_step = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if trainer.global_step > self.last_step:
            self.last_step = trainer.global_step
            pairs = zip(self.average, snapshot(pl_module), strict=True)
            self.average = [0.9 * a + 0.1 * x.double() for a, x in pairs]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.at_validation.append(self.average)
        self.after.append(snapshot(pl_module))


def fit(folder: Path, evaluate_at: Point, **kwargs: Any) -> tuple[Evaluated, Average, Any]:
    average, module = Average(), Evaluated()
    checkpoint = ModelCheckpoint(folder / evaluate_at, filename="last", monitor="val_loss")
    options = {"max_epochs": 2, "val_check_interval": 6, "enable_checkpointing": True, **kwargs}
    callbacks = [average, ema_nesterov(evaluate_at=evaluate_at), checkpoint]
    make_trainer(callbacks, **options).fit(module, loader(12), loader(2))
    saved = torch.load(folder / evaluate_at / "last.ckpt", weights_only=False)
    return module, average, saved


@pytest.mark.parametrize("kwargs", [{}, {"accumulate_grad_batches": 4}], ids=str)
def test_validation_sees_the_average_and_everyone_else_the_iterate(
    tmp_path: Path, kwargs: dict[str, Any]
) -> None:
    plain, _, _ = fit(tmp_path, "iterate", **kwargs)
    module, average, saved = fit(tmp_path, "average", **kwargs)
    assert equal(snapshot(module), snapshot(plain))  # training is the same
    assert len(module.seen) == 4
    for seen, expected in zip(module.seen, average.at_validation, strict=True):
        for value, exact in zip(seen, expected, strict=True):
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-7)
    for after, iterate in zip(average.after, plain.seen, strict=True):
        assert equal(after, iterate)
    assert not torch.allclose(module.seen[-1][0], plain.seen[-1][0], rtol=1e-2)
    assert any(
        equal([*saved["state_dict"].values()], iterate) for iterate in plain.seen
    )  # the iterate of the best validation


class FromTheStart(EMAWeightAveraging):
    """Begins at the first iterate, as ours does, and not at the one after the first step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._average_model is not None
        self._average_model.update_parameters(pl_module)


def test_values_are_those_of_lightning_s_own_average(tmp_path: Path) -> None:
    """Another implementation, which keeps a second model."""
    module, _, _ = fit(tmp_path, "average", val_check_interval=1.0)
    own, late = Evaluated(), Evaluated()
    for other, callback in ((own, FromTheStart), (late, EMAWeightAveraging)):
        callbacks = [ema_nesterov(), callback(decay=0.9, use_buffers=False)]
        make_trainer(callbacks, max_epochs=2).fit(other, loader(12), loader(2))
    for seen, theirs, without_start in zip(module.seen, own.seen, late.seen, strict=True):
        torch.testing.assert_close(seen, theirs, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(seen[0], without_start[0], rtol=1e-3)


def test_without_lookahead_it_is_a_weight_average_alone(tmp_path: Path) -> None:
    module, plain, average = Evaluated(), Toy(adamw), Average()
    callback = EMANesterov(0.0, 0.9, evaluate_at="average")
    make_trainer([callback, average], max_epochs=1).fit(module, loader(12), loader(2))
    make_trainer(max_epochs=1).fit(plain, loader(12), loader(2))
    assert equal(snapshot(module), snapshot(plain))
    for value, exact in zip(module.seen[0], average.average, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_a_validation_leaves_the_iterate(
    tmp_path: Path, error: type[BaseException]
) -> None:
    class Failing(Evaluated):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if len(self.seen) == 2:
                raise error

    module, plain = Failing(), Evaluated()
    checkpoint = ModelCheckpoint(tmp_path, filename="x", save_on_exception=True)
    trainer = make_trainer(
        [ema_nesterov(evaluate_at="average"), checkpoint],
        max_epochs=3,
        enable_checkpointing=True,
    )
    with pytest.raises((error, SystemExit)):
        trainer.fit(module, loader(12), loader(2))
    make_trainer(ema_nesterov(), max_epochs=2).fit(plain, loader(12), loader(2))
    assert equal(snapshot(module), snapshot(plain))
    [path] = tmp_path.glob("*x*.ckpt")
    saved = torch.load(path, weights_only=False)
    assert equal([*saved["state_dict"].values()], snapshot(plain))
