"""Stop, save, load, go on: bitwise as if never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.core.progress import STEP_KEY
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.toys import (
    MakeOptimizer,
    Toy,
    adamw,
    ema_nesterov,
    equal,
    loader,
    make_trainer,
    momentum,
    muon,
    sgd,
    snapshot,
)

NUM_STEPS = 12


def every_tensor(trainer: Trainer) -> list[torch.Tensor]:
    """Parameters, base state and direction, in a fixed order."""
    optimizer = trainer.optimizers[0]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state[p][key] for p in params for key in sorted(optimizer.state[p])]
    return [*params, *(state for state in states if isinstance(state, torch.Tensor))]


def fit(
    make_optimizer: MakeOptimizer,
    callbacks: list[Callback],
    *,
    num_epochs: int = NUM_STEPS // 3,
    **kwargs: Any,
) -> Trainer:
    """Train in epochs of three steps: Lightning continues exactly between two epochs."""
    fit_options = {key: kwargs.pop(key) for key in ("ckpt_path",) if key in kwargs}
    trainer = make_trainer(callbacks, max_epochs=num_epochs, **kwargs)
    # Lightning loads the weights before it converts the module to float64.
    is_double = kwargs.get("precision") == "64-true"
    scheduled = Toy(
        make_optimizer,
        dtype=torch.float64 if is_double else torch.float32,
        make_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 5, 0.5),
    )
    trainer.fit(scheduled, loader(3 * kwargs.get("accumulate_grad_batches", 1)), **fit_options)
    return trainer


def scheduled_callback() -> EMANesterov:
    return ema_nesterov(warmup=2, rest=2, total_steps=NUM_STEPS)


@pytest.mark.parametrize("make_optimizer", [sgd, momentum, adamw, muon])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_resume_is_bitwise_as_if_never_stopped(
    make_optimizer: MakeOptimizer, precision: str, tmp_path: Path
) -> None:
    whole = fit(make_optimizer, [scheduled_callback()], precision=precision)
    for num_epochs in (1, 2, 3):
        path = tmp_path / f"{num_epochs}.ckpt"
        stopped = fit(
            make_optimizer, [scheduled_callback()], num_epochs=num_epochs, precision=precision
        )
        stopped.save_checkpoint(path)
        resumed = fit(make_optimizer, [scheduled_callback()], precision=precision, ckpt_path=path)
        assert equal(every_tensor(whole), every_tensor(resumed))
        assert not equal(snapshot(whole.lightning_module), snapshot(stopped.lightning_module))
        directions = [state[DIRECTION_KEY] for state in stopped.optimizers[0].state.values()]
        wide = torch.float64 if precision == "64-true" else torch.float32
        assert {m.dtype for m in directions} == {wide}
    assert not any(DIRECTION_KEY in state for state in whole.optimizers[0].state.values())  # rest


@pytest.mark.parametrize("step", range(1, NUM_STEPS))
def test_resume_after_any_step_of_an_epoch(step: int, tmp_path: Path) -> None:
    """ModelCheckpoint saves after a step; the data is the same in every batch of the epoch."""

    class OneBatch(Toy):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self(self.batch)
            return loss

        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))

    def run(**kwargs: Any) -> Trainer:
        checkpoint = ModelCheckpoint(
            tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False
        )
        trainer = make_trainer(
            [scheduled_callback(), checkpoint],
            max_steps=NUM_STEPS,
            accumulate_grad_batches=2,
            enable_checkpointing=True,
        )
        trainer.fit(OneBatch(adamw), loader(2 * NUM_STEPS), **kwargs)
        return trainer

    whole = every_tensor(run())
    resumed = run(ckpt_path=tmp_path / f"step={step}.ckpt")
    assert resumed.global_step == NUM_STEPS
    assert equal(whole, every_tensor(resumed))


def test_checkpoint_made_without_the_callback_continues_with_it(tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    fit(adamw, [], num_epochs=2).save_checkpoint(path)
    plain = fit(adamw, [], ckpt_path=path)
    resumed = fit(adamw, [scheduled_callback()], ckpt_path=path)
    assert resumed.optimizers[0].param_groups[0][STEP_KEY] == NUM_STEPS  # rests when due
    assert not equal(snapshot(plain.lightning_module), snapshot(resumed.lightning_module))
    idle = fit(adamw, [ema_nesterov(warmup=NUM_STEPS - 1)], ckpt_path=path)
    assert idle.optimizers[0].param_groups[0][STEP_KEY] == NUM_STEPS


@pytest.mark.filterwarnings("ignore:EMANesterov never looks ahead")
def test_checkpoint_made_with_the_callback_continues_without_it(tmp_path: Path) -> None:
    path = tmp_path / "with.ckpt"
    stopped = fit(adamw, [scheduled_callback()], num_epochs=2)
    stopped.save_checkpoint(path)
    start = torch.load(path, weights_only=False)
    assert equal(list(start["state_dict"].values()), snapshot(stopped.lightning_module))
    plain = fit(adamw, [], ckpt_path=path)
    idle = fit(adamw, [ema_nesterov(lookahead_step_size=0.0)], ckpt_path=path)
    assert equal(snapshot(plain.lightning_module), snapshot(idle.lightning_module))


def test_crash_between_steps_resumes_bitwise(tmp_path: Path) -> None:
    class Crashes(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, *args: Any
        ) -> None:
            if trainer.global_step == 7:
                raise ConnectionError

    def checkpoint() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)

    options: dict[str, Any] = {"enable_checkpointing": True}
    with pytest.raises(ConnectionError):
        fit(adamw, [scheduled_callback(), checkpoint(), Crashes()], **options)
    path = tmp_path / "last.ckpt"
    resumed = fit(adamw, [scheduled_callback(), checkpoint()], ckpt_path=path, **options)
    assert equal(every_tensor(fit(adamw, [scheduled_callback()])), every_tensor(resumed))


def test_extra_state_is_one_float32_element_for_each_parameter_element() -> None:
    sizes = {}
    for name, callbacks in (("plain", []), ("with", [ema_nesterov()])):
        trainer = fit(adamw, list(callbacks))
        states = [v for state in trainer.optimizers[0].state.values() for v in state.values()]
        sizes[name] = sum(v.numel() * v.element_size() for v in states)
    num_elements = sum(p.numel() for p in Toy(adamw).parameters())
    assert sizes["with"] - sizes["plain"] == 4 * num_elements
