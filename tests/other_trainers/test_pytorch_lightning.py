"""The callback in the Trainer of ``pytorch_lightning``, Lightning under its older name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning_fabric
import pytest
import pytorch_lightning as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import GradientAccumulationScheduler, LambdaCallback
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_ema_nesterov import EMANesterov, attach_ema_nesterov
from lightning_ema_nesterov.trainer.import_style import is_lightning, lightning_classes
from lightning_ema_nesterov.trainer.questions import estimate_total_steps
from tests.other_trainers.problem import (
    EMA_DECAY,
    Net,
    adamw,
    averages,
    check,
    examples,
    loss_at,
    oracle,
    whole_batch,
)

NUM_STEPS = 8


class Module(pl.LightningModule):
    """The network as a module of the older name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.val_losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        result: dict[str, Tensor] = self.net(**batch)
        return result["loss"]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.val_losses.append(float(self.net(**batch)["loss"]))

    def configure_optimizers(self) -> Optimizer:
        return adamw(self.parameters())


def ema_nesterov(**kwargs: Any) -> EMANesterov:
    return EMANesterov(**{"ema_decay": EMA_DECAY, "warmup": 0, "rest": 0, **kwargs})


def make_trainer(*callbacks: Any, **kwargs: Any) -> pl.Trainer:
    options: dict[str, Any] = {
        "max_epochs": NUM_STEPS,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        **kwargs,
    }
    return pl.Trainer(callbacks=list(callbacks), **options)


def loader(batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(examples(), batch_size=batch_size)  # type: ignore[arg-type]  # a list will do


def params(module: pl.LightningModule) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_matches_the_reference(accumulate: int) -> None:
    module = Module()
    trainer = make_trainer(ema_nesterov(), accumulate_grad_batches=accumulate)
    trainer.fit(module, loader(4 // accumulate))
    check(module.parameters(), NUM_STEPS)


def test_others_see_the_iterate_in_an_accumulation_window() -> None:
    """A LambdaCallback of the older name is known to run what the user wrote."""
    module, seen = Module(), []
    look = LambdaCallback(on_train_batch_end=lambda *_: seen.append(params(module)))
    make_trainer(ema_nesterov(), look, accumulate_grad_batches=2).fit(module, loader(2))
    iterates = oracle(NUM_STEPS)
    expected = [iterates[(idx + 1) // 2] for idx in range(2 * NUM_STEPS)]
    torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("evaluate_at", ["iterate", "average"])
def test_validation_sees_the_iterate_or_the_average(evaluate_at: str) -> None:
    module = Module()
    trainer = make_trainer(ema_nesterov(evaluate_at=evaluate_at))
    trainer.fit(module, loader(), loader())
    trainer.validate(module, loader(), verbose=False)
    iterates = oracle(NUM_STEPS)
    points = averages(iterates) if evaluate_at == "average" else iterates
    losses = [float(loss_at(point)) for point in points[1:]]
    assert module.val_losses == pytest.approx([*losses, losses[-1]], rel=1e-9)
    assert float(loss_at(iterates[-1])) != pytest.approx(float(loss_at(averages(iterates)[-1])))


def test_resumed_run_is_bitwise_the_same(tmp_path: Path) -> None:
    whole, half, resumed = Module(), Module(), Module()
    make_trainer(ema_nesterov()).fit(whole, loader())
    first = make_trainer(ema_nesterov(), max_epochs=4)
    first.fit(half, loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    make_trainer(ema_nesterov()).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(params(whole), params(resumed), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(params(whole), params(half), strict=True))


def test_steps_are_counted_with_a_schedule_of_accumulation() -> None:
    counted: list[int | None] = []
    count = LambdaCallback(on_train_start=lambda t, _: counted.append(estimate_total_steps(t)))
    schedule = GradientAccumulationScheduler({0: 1, 4: 2})
    trainer = make_trainer(ema_nesterov(), schedule, count)
    trainer.fit(Module(), loader(2))
    assert counted == [trainer.global_step] == [12]


def test_scalars_are_logged(tmp_path: Path) -> None:
    trainer = make_trainer(ema_nesterov(), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(Module(), loader())
    assert float(trainer.logged_metrics["ema_nesterov/step_size"]) == 0.5


def test_a_module_without_an_optimizer_is_refused() -> None:
    class Empty(Module):
        def configure_optimizers(self) -> Any:
            return None

    with (
        pytest.warns(UserWarning, match="returned `None`"),
        pytest.raises(MisconfigurationException, match="needs an optimizer"),
    ):
        make_trainer(ema_nesterov()).fit(Empty(), loader())


def test_classes_are_those_of_the_trainer() -> None:
    class Own(pl.Trainer):
        pass

    [found] = lightning_classes(Own(logger=False), "callbacks.LambdaCallback")
    assert found is LambdaCallback
    assert is_lightning(LambdaCallback)
    assert not is_lightning(Module)


def test_fabric_of_the_older_name_matches_the_reference() -> None:
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1)
    net = Net()
    model, optimizer = fabric.setup(net, adamw(net.parameters()))
    attach_ema_nesterov(optimizer, model, ema_decay=EMA_DECAY, warmup=0, rest=0)
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        fabric.backward(model(**whole_batch())["loss"])
        optimizer.step()
    check(net.parameters(), NUM_STEPS)
    assert isinstance(net, nn.Module)
