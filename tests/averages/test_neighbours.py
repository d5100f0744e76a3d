"""Validation at the average beside what else a run can have."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn

from lightning_ema_nesterov.averages import average_checkpoint
from lightning_ema_nesterov.core.equations import join_
from lightning_ema_nesterov.rules import codecs, ema_joined
from tests.toys import Manual, Toy, adamw, ema_nesterov, equal, loader, make_trainer, snapshot
from tests.versions import EMAWeightAveraging


class Evaluated(Toy):
    """Notes what the parameters are after each step and in each validation."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(adamw, **kwargs)
        self.seen: list[tuple[int, list[Tensor]]] = []

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 0:
            self.seen.append((self.trainer.global_step, snapshot(self)))


class Iterates(Callback):
    """The iterates x_0 ... x_t."""

    def __init__(self) -> None:
        self.all: list[list[Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.all.append(snapshot(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.all.append(snapshot(pl_module))


def average_of(iterates: list[list[Tensor]]) -> list[Tensor]:
    average = [x.double() for x in iterates[0]]
    for iterate in iterates[1:]:
        average = [0.9 * a + 0.1 * x.double() for a, x in zip(average, iterate, strict=True)]
    return average


def distance(first: Iterable[Tensor], second: Iterable[Tensor]) -> float:
    pairs = list(zip(first, second, strict=True))
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


def fit(
    module: Toy,
    *callbacks: Callback,
    evaluate_at: str = "average",
    num_epochs: int = 2,
    direction_dtype: str = "float32",
    compile: bool = False,
    lookahead_step_size: float = 0.5,
    **kwargs: Any,
) -> Trainer:
    callback = ema_nesterov(
        lookahead_step_size=lookahead_step_size,
        evaluate_at=evaluate_at,
        direction_dtype=direction_dtype,
        compile=compile,
    )
    trainer = make_trainer([callback, *callbacks], max_epochs=num_epochs, **kwargs)
    trainer.fit(module, loader(12, next(module.parameters()).dtype), loader(2))
    return trainer


@pytest.mark.filterwarnings("ignore:EMANesterov never looks ahead")
@pytest.mark.parametrize("lookahead_step_size", [0.0, 0.5])
def test_bfloat16_weights(tmp_path: Path, lookahead_step_size: float) -> None:
    """The direction is float32, and the average is rounded once."""
    bound = 2**-8  # half a unit in the last place of bfloat16
    plain, module, iterates = Evaluated(), Evaluated(), Iterates()
    options: dict[str, Any] = {"precision": "bf16-true", "lookahead_step_size": lookahead_step_size}
    fit(plain, evaluate_at="iterate", **options)
    trainer = fit(module, iterates, **options)
    assert equal(snapshot(module), snapshot(plain))
    assert next(module.parameters()).dtype == torch.bfloat16
    for step, seen in module.seen:
        exact = average_of(iterates.all[: step + 1])
        assert distance(seen, exact) < bound
        assert distance(iterates.all[step], exact) > 2 * bound
    directions = [
        trainer.optimizers[0].state[p]["ema_nesterov_direction"] for p in module.parameters()
    ]
    pairs = zip(iterates.all[-1], directions, strict=True)
    assert equal(module.seen[-1][1], [(x.float() - 9.0 * m).bfloat16() for x, m in pairs])
    path = tmp_path / "x.ckpt"
    trainer.save_checkpoint(path)
    assert equal(list(torch.load(path, weights_only=False)["state_dict"].values()), snapshot(plain))


class TwoOptimizers(Manual):
    """Manual optimization, which notes validations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, list[Tensor]]] = []

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 0:
            self.seen.append((self.trainer.global_step // 2, snapshot(self)))


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    plain, module, iterates = TwoOptimizers(), TwoOptimizers(), Iterates()
    fit(plain, evaluate_at="iterate")
    trainer = fit(module, iterates)
    assert equal(snapshot(module), snapshot(plain))
    assert [step for step, _ in module.seen] == [12, 24]
    for step, seen in module.seen:
        exact = average_of(iterates.all[: step + 1])
        assert distance(seen, exact) < 1e-5
        assert distance(iterates.all[step], exact) > 1e-2
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    average_checkpoint(tmp_path / "x.ckpt", tmp_path / "average.ckpt")
    made = torch.load(tmp_path / "average.ckpt", weights_only=True)["state_dict"]
    assert distance(made.values(), average_of(iterates.all)) < 1e-5


def test_compiled_form_whose_updates_end_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a step and the next forward pass the state holds a fold; validation reads it."""
    monkeypatch.setattr(ema_joined, "_MIN_ELEMENTS", 1)
    calls: list[int] = []

    def kernel(m: Tensor, y: Tensor, coefficients: Tensor) -> None:
        calls.append(m.numel())
        join_(m, y, coefficients)

    monkeypatch.setattr(ema_joined, "_compiled", kernel)
    late, iterate, usual = Evaluated(), Evaluated(), Evaluated()
    iterates = Iterates()
    trainer = fit(late, compile=True)
    fit(iterate, evaluate_at="iterate", compile=True)
    fit(usual, iterates)
    assert len(calls) > 40
    assert trainer.global_step == 24
    assert equal(snapshot(late), snapshot(iterate))
    for (step, seen), (_, as_usual) in zip(late.seen, usual.seen, strict=True):
        exact = average_of(iterates.all[: step + 1])
        assert distance(seen, exact) < 1e-5
        assert distance(as_usual, exact) < 1e-5
        assert distance(iterates.all[step], exact) > 1e-2


@pytest.mark.parametrize(("direction_dtype", "bound"), [("int8", 0.1), ("bfloat16", 0.05)])
def test_compressed_directions(
    direction_dtype: str, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codecs, "_MIN_ELEMENTS", 1)
    monkeypatch.setattr(codecs, "BLOCK_SIZE", 4)
    plain, module, iterates = Evaluated(), Evaluated(), Iterates()
    fit(plain, evaluate_at="iterate", direction_dtype=direction_dtype)
    fit(module, iterates, direction_dtype=direction_dtype)
    assert equal(snapshot(module), snapshot(plain))
    for step, seen in module.seen:
        for value, exact, x in zip(
            seen, average_of(iterates.all[: step + 1]), iterates.all[step], strict=True
        ):
            # The direction was rounded at random in each step.
            assert (value.double() - exact).norm() < bound * (x.double() - exact).norm()


class SavesOrEnds(Evaluated):
    """In its second validation saves a checkpoint, or is told to end."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.path = path

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if len(self.seen) == 2 and batch_idx == 0:
            if self.path is None:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            before = snapshot(self)
            self.trainer.save_checkpoint(self.path)
            assert equal(snapshot(self), before)  # it is at the average again


def test_checkpoint_in_the_middle_of_a_validation_holds_the_iterate(tmp_path: Path) -> None:
    plain, module = Evaluated(), SavesOrEnds(tmp_path / "x.ckpt")
    fit(plain, evaluate_at="iterate")
    fit(module)
    saved = torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert equal([*saved["state_dict"].values()], plain.seen[1][1])
    assert distance(module.seen[1][1], plain.seen[1][1]) > 1e-2


def test_sigterm_in_the_middle_of_a_validation_saves_the_iterate(tmp_path: Path) -> None:
    plain, module = Evaluated(), SavesOrEnds()
    fit(plain, evaluate_at="iterate")
    checkpoint = ModelCheckpoint(tmp_path, filename="x", save_on_exception=True)
    with pytest.raises(SystemExit):
        fit(module, checkpoint, num_epochs=3, enable_checkpointing=True)
    assert equal(snapshot(module), plain.seen[1][1])
    [path] = tmp_path.glob("*.ckpt")
    saved = torch.load(path, weights_only=False)
    assert saved["global_step"] == 24
    assert equal([*saved["state_dict"].values()], plain.seen[1][1])


class Normed(Evaluated):
    """Batch normalisation in front."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, batch: Tensor) -> Tensor:
        return super().forward(torch.cat([self.norm(batch[:, :4]), batch[:, 4:]], dim=1))


def test_running_statistics_are_those_of_the_iterate() -> None:
    """No average of them is kept: validation at the average sees those of training."""
    plain, module = Normed(), Normed()
    statistics: list[Tensor] = []

    class Looks(Callback):
        def on_validation_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
        ) -> None:
            statistics.append(dict(module.named_buffers())["norm.running_mean"].clone())

    fit(plain, evaluate_at="iterate")
    fit(module, Looks())
    assert len(statistics) == 4
    for name, value in plain.named_buffers():
        assert torch.equal(dict(module.named_buffers())[name], value)
    assert torch.equal(statistics[-1], dict(plain.named_buffers())["norm.running_mean"])
    assert not torch.equal(statistics[0], statistics[-1])
    assert equal(snapshot(module), snapshot(plain))


def test_beside_the_average_of_lightning_that_one_is_what_validation_sees(tmp_path: Path) -> None:
    """Its hooks come later. Training, checkpoints and our average stay what they are."""
    alone, plain, iterates = Evaluated(), Evaluated(), Iterates()
    make_trainer([ema_nesterov(), EMAWeightAveraging(decay=0.9)], max_epochs=2).fit(
        alone, loader(12), loader(2)
    )
    fit(plain, iterates, evaluate_at="iterate")
    module = Evaluated()
    checkpoint = ModelCheckpoint(tmp_path, filename="both")
    trainer = fit(module, EMAWeightAveraging(decay=0.9), checkpoint, enable_checkpointing=True)
    for (_, seen), (_, expected) in zip(module.seen, alone.seen, strict=True):
        assert equal(seen, expected)
    saved = torch.load(tmp_path / "both.ckpt", weights_only=False)
    assert equal([*saved["current_model_state"].values()], iterates.all[-1])
    average_checkpoint(tmp_path / "both.ckpt", tmp_path / "average.ckpt")
    made = torch.load(tmp_path / "average.ckpt", weights_only=True)
    assert "current_model_state" not in made
    exact = average_of(iterates.all)
    assert distance(made["state_dict"].values(), exact) < 1e-5
    # After fit Lightning's average is in the model, and ours is none of those weights.
    left = snapshot(module)
    with pytest.warns(UserWarning, match="has no average of these weights"):
        trainer.validate(module, loader(2), verbose=False)
    assert equal(module.seen[-1][1], left)
    assert distance(left, exact) > 1e-4
    options: dict[str, Any] = {
        "ckpt_path": tmp_path / "both.ckpt",
        "weights_only": False,
        "verbose": False,
    }
    alone_again = make_trainer(ema_nesterov(evaluate_at="average"))
    with pytest.raises(MisconfigurationException, match="must go without WeightAveraging"):
        alone_again.validate(Evaluated(), loader(2), **options)


def test_beside_stochastic_weight_averaging(tmp_path: Path) -> None:
    """SWA puts its own weights into the model at the end; ours are none of those."""

    def swa() -> StochasticWeightAveraging:
        return StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=1)

    plain, module, iterates = Evaluated(), Evaluated(), Iterates()
    fit(plain, swa(), evaluate_at="iterate", num_epochs=4)
    trainer = fit(module, iterates, swa(), num_epochs=4)
    assert equal(snapshot(module), snapshot(plain))
    for step, seen in module.seen:
        exact = average_of(iterates.all[: step + 1])
        assert distance(seen, exact) < 1e-5
    left = snapshot(module)
    with pytest.warns(UserWarning, match="has no average of these weights"):
        trainer.validate(module, loader(2), verbose=False)
    assert equal(module.seen[-1][1], left)


def test_weights_that_were_loaded_after_fit_have_no_average(tmp_path: Path) -> None:
    module, other = Evaluated(), Evaluated()
    trainer = fit(module)
    x = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(Toy(adamw).state_dict())
    with pytest.warns(UserWarning, match="has no average of these weights"):
        trainer.validate(module, loader(2), verbose=False)
    assert equal(module.seen[-1][1], snapshot(other))
    module.load_state_dict(x)
    trainer.validate(module, loader(2), verbose=False)  # these have one
    assert equal(module.seen[-1][1], module.seen[-3][1])


def test_checkpoint_that_was_evaluated_before_does_not_count_in_the_next_fit(
    tmp_path: Path,
) -> None:
    """Also where the evaluation failed, and nobody tore it down."""

    class Fails(Evaluated):
        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            raise ValueError("on purpose")

    module, iterates = Fails(), Iterates()
    callback = ema_nesterov(evaluate_at="average")
    make_trainer([callback], max_epochs=1).fit(module, loader(12), loader(2))
    trainer = make_trainer([callback, iterates], max_epochs=2)
    saver = make_trainer([ema_nesterov()], max_epochs=1)
    saver.fit(Fails(), loader(12), loader(2))
    saver.save_checkpoint(tmp_path / "x.ckpt")
    options: dict[str, Any] = {
        "ckpt_path": tmp_path / "x.ckpt",
        "weights_only": False,
        "verbose": False,
    }
    with pytest.raises(ValueError, match="on purpose"):
        trainer.test(module, loader(2), **options)
    trainer.fit(module, loader(12), loader(2))
    step, seen = module.seen[-1]
    exact = average_of(iterates.all[: step + 1])
    assert distance(seen, exact) < 1e-5
