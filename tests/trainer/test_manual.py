"""Manual optimization: several optimizers, closures, windows of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.core.progress import STEP_KEY
from tests.core import reference
from tests.toys import (
    Batches,
    MakeOptimizer,
    Manual,
    Recorder,
    Toy,
    adamw,
    batch_gradients,
    ema_directions,
    ema_nesterov,
    equal,
    loader,
    lookahead_point,
    make_trainer,
    relative_error,
    sgd,
    snapshot,
)
from tests.versions import is_older_lightning, muon


class InTurns(Optimizer):
    """One optimizer for each parameter, for the oracle: it steps those that have a gradient.

    Attributes:
        iterates: Where the last step of each parameter left it.
    """

    def __init__(self, params: list[Tensor], makes: list[MakeOptimizer]) -> None:
        super().__init__(params, {})
        self.params = params
        self.optimizers = [make([p]) for make, p in zip(makes, params, strict=True)]
        self.iterates = [p.detach().clone() for p in params]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for idx, (p, optimizer) in enumerate(zip(self.params, self.optimizers, strict=True)):
            if p.grad is not None:
                optimizer.step()
                self.iterates[idx] = p.detach().clone()


def oracle_of_manual(
    num_batches: int, *, steps: int = 1, make_first: MakeOptimizer = sgd
) -> list[list[Tensor]]:
    """The iterates of :class:`Manual` after each batch, as steps of one parameter at a time.

    Both parameters are at y when a batch begins; the second optimizer finds the first parameter
    where its optimizer left it.
    """
    by_batch = batch_gradients(Toy(adamw), Batches(num_batches, torch.float64).data)
    made: list[InTurns] = []

    def make_in_turns(params: list[Tensor]) -> Optimizer:
        made.append(InTurns(params, [make_first, adamw]))
        return made[-1]

    def gradients(params: list[Tensor], step_idx: int) -> list[Tensor | None]:
        batch_idx, place = divmod(step_idx, 2 * steps)
        if place < steps:
            return [by_batch(params, batch_idx)[0], None]
        point = [made[-1].iterates[0].requires_grad_(), params[1]]
        return [None, by_batch(point, batch_idx)[1]]

    trajectory, _ = reference.train(
        snapshot(Toy(adamw)),
        gradients,
        make_in_turns,
        num_steps=2 * steps * num_batches,
        ema_decay=0.9,
        step_size=lambda _: 0.5,
    )
    return trajectory[:: 2 * steps]


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_two_optimizers_in_turn_match_the_reference(steps: int, closure: bool) -> None:
    callback, recorder = ema_nesterov(), Recorder("on_train_batch_end")
    module = Manual(closure=closure, steps=steps, callback=callback)
    make_trainer([recorder, callback], max_epochs=1).fit(module, loader(20))
    expected = oracle_of_manual(20, steps=steps)
    for params, x in zip(recorder.params, expected[1:], strict=True):
        assert relative_error(params, x) < 1e-5  # float32 against float64
    assert relative_error(expected[-1], oracle_of_manual(20, steps=3 - steps)[-1]) > 1e-2


@pytest.mark.usefixtures("exact_muon")
def test_muon_next_to_adamw_matches_the_reference() -> None:
    module, recorder = Manual(make_first=muon), Recorder("on_train_batch_end")
    make_trainer([recorder, ema_nesterov()], max_epochs=1).fit(module, loader(20))
    expected = oracle_of_manual(20, make_first=muon)
    for params, x in zip(recorder.params, expected[1:], strict=True):
        assert relative_error(params, x) < 1e-4  # Muon amplifies rounding
    assert relative_error(expected[-1], oracle_of_manual(20)[-1]) > 1e-3


def test_second_step_without_extrapolate_has_no_lookahead() -> None:
    """Its forward pass runs at the iterate that the first step left."""

    class Notes(Manual):
        def __init__(self) -> None:
            super().__init__(steps=2)
            self.points: list[list[Tensor]] = []

        def forward(self, batch: Tensor) -> Tensor:
            self.points.append(snapshot(self))
            return super().forward(batch)

    module = Notes()
    make_trainer(ema_nesterov(), max_epochs=1).fit(module, loader(20))
    assert relative_error(snapshot(module), oracle_of_manual(20, steps=2)[-1]) > 1e-4
    # Four forward passes a batch. The first two of the second batch are those of the first
    # optimizer, which is gradient descent: nothing is added to where its step ends.
    first, second = module.points[4:6]
    by_batch = batch_gradients(Toy(adamw), Batches(20, torch.float64).data)
    gradient = by_batch([p.double().requires_grad_() for p in first], 1)[0]
    assert gradient is not None
    assert relative_error([second[0]], [first[0].double() - 5e-2 * gradient]) < 1e-6
    assert relative_error([second[0]], [first[0]]) > 1e-3


def test_extrapolate_outside_of_fit_is_refused() -> None:
    with pytest.raises(
        RuntimeError, match="must be called during fit with an optimizer of the module"
    ):
        ema_nesterov().extrapolate(sgd(Toy(sgd).parameters()))


@pytest.mark.parametrize(
    "hooks",
    [
        ("on_validation_start", "on_train_epoch_end"),
        ("on_validation_start", "on_train_epoch_end", "on_train_batch_end"),
    ],
)
def test_accumulation_over_batches_and_epochs_keeps_one_window(hooks: tuple[str, ...]) -> None:
    """Whoever looks in it: at the ends of epochs only, or after each batch too."""

    class Accumulates(Toy):
        def __init__(self) -> None:
            super().__init__(sgd)
            self.automatic_optimization = False
            self.num_batches = 0

        def on_validation_model_zero_grad(self) -> None:
            pass  # Lightning would drop the gradients of the open window

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            self.manual_backward(self.forward(batch) / 4)
            self.num_batches += 1
            if self.num_batches % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()

    module, recorder = Accumulates(), Recorder(*hooks)
    callback = EMANesterov(0.5, 0.9, warmup=0, rest=0.5, total_steps=8)
    trainer = make_trainer([callback, recorder], max_epochs=2, val_check_interval=5)
    trainer.fit(module, loader(14), loader(1))
    batches = Batches(14, torch.float64).data.repeat(2, 1, 1)
    expected, _ = reference.train(
        snapshot(Toy(sgd)),
        batch_gradients(Toy(sgd), batches, 4),
        sgd,
        num_steps=7,
        ema_decay=0.9,
        step_size=lambda t: 0.5 if t < 4 else 0.0,
    )
    for _, step, params in recorder.seen:
        assert relative_error(params, expected[step]) < 1e-5
    assert trainer.global_step == 7
    assert relative_error(expected[7], expected[6]) > 1e-3


def test_lbfgs_begins_each_step_at_the_lookahead_point() -> None:
    """It calls its closure several times; the first call is the one at y."""

    class Notes(Toy):
        def __init__(self) -> None:
            super().__init__(lbfgs)
            self.points: dict[int, list[Tensor]] = {}

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.points.setdefault(batch_idx, snapshot(self))
            return self.forward(batch)

    def lbfgs(params: Iterable[Tensor]) -> Optimizer:
        return torch.optim.LBFGS(params, lr=0.1, max_iter=3)

    def loss_of(module: Toy) -> float:
        return torch.stack([module(batch) for batch in Batches(10).data]).mean().item()

    module, recorder = Notes(), Recorder("on_train_start", "on_train_batch_end")
    callback = ema_nesterov(lookahead_step_size=0.3)
    make_trainer([callback, recorder], max_steps=10).fit(module, loader(10))
    directions = ema_directions(recorder.params)
    for t, point in module.points.items():
        y = lookahead_point(recorder.params[t], directions[t], 0.3)
        assert relative_error(point, y) < 1e-6
        assert t == 0 or relative_error(point, recorder.params[t]) > 1e-4
    assert len(module.points) == 10
    assert loss_of(module) < 0.8 * loss_of(Toy(lbfgs))


class Shares(Toy):
    """Two optimizers that share all parameters, two batches a step of each."""

    def __init__(self) -> None:
        super().__init__(sgd)
        self.automatic_optimization = False
        self.points: list[list[Tensor]] = []

    def configure_optimizers(self) -> Any:
        return [sgd(self.parameters()), sgd(self.parameters())]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.points.append(snapshot(self))
        self.manual_backward(self.forward(batch) / 2)
        if batch_idx % 2:
            for optimizer in cast("list[Any]", self.optimizers()):
                optimizer.step()
            self.zero_grad()


def test_a_look_in_the_window_of_optimizers_that_share_parameters_changes_nothing() -> None:
    quiet, watched = Shares(), Shares()
    make_trainer(ema_nesterov(), max_epochs=1).fit(quiet, loader(16))
    recorder = Recorder("on_train_batch_start")
    make_trainer([ema_nesterov(), recorder], max_epochs=1).fit(watched, loader(16))
    assert len(watched.points) == 16
    for first, second in zip(watched.points[::2], watched.points[1::2], strict=True):
        assert equal(first, second)
    assert equal(snapshot(quiet), snapshot(watched))
    assert not equal(recorder.params[-1], watched.points[-1])


class StepsSecond(Manual):
    """The first optimizer steps in every batch, the second where it is asked to."""

    def __init__(self, is_asked: Callable[[int], bool]) -> None:
        super().__init__()
        self.is_asked = is_asked

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = cast("list[Any]", self.optimizers())
        loss = self.forward(torch.ones_like(batch))  # a loader begins anew where a run resumes
        self.zero_grad()
        self.manual_backward(loss)
        first.step()
        if self.is_asked(batch_idx):
            second.step()


class SavesAfter(Callback):
    def __init__(self, batch_idx: int, path: Path) -> None:
        self.batch_idx = batch_idx
        self.path = path

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.batch_idx:
            trainer.save_checkpoint(self.path)


def test_an_optimizer_that_has_not_stepped_yet_resumes_at_its_first_step(tmp_path: Path) -> None:
    """The second one steps from batch 6 on, behind the checkpoint."""
    if is_older_lightning():
        pytest.skip("this Lightning trains the last batch before a checkpoint again")

    def callback() -> EMANesterov:
        return EMANesterov(0.5, 0.9, warmup=3, rest=0, total_steps=12)

    whole, resumed = (StepsSecond(lambda batch_idx: batch_idx >= 6) for _ in range(2))
    saves = SavesAfter(3, tmp_path / "early.ckpt")
    trainer = make_trainer([callback(), saves], max_epochs=1)
    trainer.fit(whole, loader(12))
    again = make_trainer(callback(), max_epochs=1)
    again.fit(resumed, loader(12), ckpt_path=tmp_path / "early.ckpt")
    for one in (trainer, again):
        assert [o.param_groups[0][STEP_KEY] for o in one.optimizers] == [12, 6]
    assert equal(snapshot(whole), snapshot(resumed))


class LoadsWhatItHas(Callback):
    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.load_state_dict(optimizer.state_dict())


def test_each_optimizer_counts_its_own_steps_also_where_it_resumes(tmp_path: Path) -> None:
    """One that steps less often than the Trainer counts was not trained without the callback."""
    if is_older_lightning():
        pytest.skip("this Lightning trains the last batch before a checkpoint again")

    def callback() -> EMANesterov:
        return EMANesterov(0.5, 0.9, warmup=1, rest=0, total_steps=12)

    whole, resumed, loads = (StepsSecond(lambda batch_idx: batch_idx % 3 == 0) for _ in range(3))
    saves = SavesAfter(7, tmp_path / "early.ckpt")  # 8 and 3 steps, which the Trainer counts as 11
    trainers = [
        make_trainer(callbacks, max_epochs=1)
        for callbacks in ([callback(), saves], [callback()], [callback(), LoadsWhatItHas()])
    ]
    trainers[0].fit(whole, loader(12))
    trainers[1].fit(resumed, loader(12), ckpt_path=tmp_path / "early.ckpt")
    trainers[2].fit(loads, loader(12))
    for module, trainer in zip((whole, resumed, loads), trainers, strict=True):
        assert [o.param_groups[0][STEP_KEY] for o in trainer.optimizers] == [12, 4]
        assert equal(snapshot(whole), snapshot(module))
