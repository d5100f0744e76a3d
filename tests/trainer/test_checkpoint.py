"""Stop, save, load, go on: bitwise as if never stopped."""

from __future__ import annotations

import copy
import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.core.progress import STEP_KEY
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.core import reference
from tests.toys import (
    Batches,
    MakeOptimizer,
    Toy,
    adamw,
    batch_gradients,
    ema_nesterov,
    equal,
    loader,
    make_trainer,
    momentum,
    relative_error,
    sgd,
    snapshot,
)
from tests.versions import is_older_lightning, muon

NUM_STEPS = 12


def every_tensor(trainer: Trainer) -> list[torch.Tensor]:
    """Parameters, base state and direction, in a fixed order."""
    optimizer = trainer.optimizers[0]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state[p][key] for p in params for key in sorted(optimizer.state[p])]
    return [*params, *(state for state in states if isinstance(state, torch.Tensor))]


def directions_of(trainer: Trainer) -> list[torch.Tensor]:
    """The direction of each parameter."""
    optimizer = trainer.optimizers[0]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p][DIRECTION_KEY] for p in params]


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


PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "64-true")
QUICK_RUNS = [(sgd, "32-true"), *((adamw, precision) for precision in PRECISIONS)]


@pytest.mark.parametrize(
    ("make_optimizer", "precision"),
    [
        pytest.param(*run, marks=() if run in QUICK_RUNS else pytest.mark.slow)
        for run in itertools.product((sgd, momentum, adamw, muon), PRECISIONS)
    ],
)
def test_resume_is_bitwise_as_if_never_stopped(
    make_optimizer: MakeOptimizer, precision: str, tmp_path: Path
) -> None:
    wide = torch.float64 if precision == "64-true" else torch.float32
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
        for trainer in (stopped, resumed):
            assert {m.dtype for m in directions_of(trainer)} == {wide}


@pytest.mark.parametrize(
    "step",
    [pytest.param(n, marks=() if n in (1, 6, 11) else pytest.mark.slow) for n in range(1, 12)],
)
def test_resume_after_any_step_of_an_epoch(step: int, tmp_path: Path) -> None:
    """ModelCheckpoint saves after a step; the data is the same in every batch of the epoch."""

    class OneBatch(Toy):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.forward(self.batch)

        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))

    def run(*callbacks: Callback, folder: str = "ours", **kwargs: Any) -> Trainer:
        checkpoint = ModelCheckpoint(
            tmp_path / folder,
            "{step}",
            every_n_train_steps=1,
            save_top_k=-1,
            enable_version_counter=False,
        )
        trainer = make_trainer(
            [*callbacks, checkpoint],
            max_steps=NUM_STEPS,
            accumulate_grad_batches=2,
            enable_checkpointing=True,
        )
        trainer.fit(OneBatch(adamw), loader(2 * NUM_STEPS), **kwargs)
        return trainer

    if is_older_lightning():
        plain = run(folder="plain")
        again = run(folder="plain", ckpt_path=tmp_path / "plain" / f"step={step}.ckpt")
        if not equal(every_tensor(plain), every_tensor(again)):
            pytest.skip("this Lightning does not resume exactly, with or without the callback")
    whole = every_tensor(run(scheduled_callback()))
    resumed = run(scheduled_callback(), ckpt_path=tmp_path / "ours" / f"step={step}.ckpt")
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


def test_direction_from_before_epochs_without_the_callback_is_not_taken_up(tmp_path: Path) -> None:
    """A run without it keeps what it finds in the optimizer's state, and saves it again."""
    path, plain_path = tmp_path / "last.ckpt", tmp_path / "plain.ckpt"
    fit(adamw, [scheduled_callback()], num_epochs=1).save_checkpoint(path)
    fit(adamw, [], num_epochs=2, ckpt_path=path).save_checkpoint(path)
    plain = torch.load(path, weights_only=False)
    for state in plain["optimizer_states"][0]["state"].values():
        del state[DIRECTION_KEY]
    for group in plain["optimizer_states"][0]["param_groups"]:
        for key in [key for key in group if key.startswith("ema_nesterov")]:
            del group[key]
    torch.save(plain, plain_path)
    trainers = [
        fit(adamw, [scheduled_callback()], num_epochs=3, ckpt_path=p) for p in (path, plain_path)
    ]
    assert equal(*[every_tensor(trainer) for trainer in trainers])
    for trainer in trainers:
        assert trainer.optimizers[0].state_dict()["param_groups"][0][STEP_KEY] == 9
    assert not equal(
        *[snapshot(t.lightning_module) for t in (trainers[0], fit(adamw, [], num_epochs=3))]
    )


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


class ReturnsToEarlier(Callback):
    """Go back in step 8 to the weights and the state of step 4, as after a spike of the loss."""

    def __init__(self) -> None:
        self.earlier: tuple[dict[str, Any], dict[str, Any]] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        optimizer = trainer.optimizers[0]
        if trainer.global_step == 4:
            self.earlier = copy.deepcopy((pl_module.state_dict(), optimizer.state_dict()))
        if trainer.global_step == 8 and self.earlier is not None:
            pl_module.load_state_dict(self.earlier[0])
            optimizer.load_state_dict(self.earlier[1])


def test_run_that_returned_to_earlier_weights_resumes_bitwise(tmp_path: Path) -> None:
    """What it went back to is its own: the directions count, and it rests when the Trainer ends."""
    path = tmp_path / "last.ckpt"
    whole = fit(adamw, [scheduled_callback(), ReturnsToEarlier()])
    stopped = fit(adamw, [scheduled_callback(), ReturnsToEarlier()], num_epochs=3)
    stopped.save_checkpoint(path)
    resumed = fit(adamw, [scheduled_callback(), ReturnsToEarlier()], ckpt_path=path)
    assert equal(every_tensor(whole), every_tensor(resumed))
    assert whole.optimizers[0].state_dict()["param_groups"][0][STEP_KEY] == NUM_STEPS
    assert not equal(every_tensor(whole), every_tensor(fit(adamw, [scheduled_callback()])))


def test_run_that_is_made_longer_continues_with_the_direction_of_its_rest(tmp_path: Path) -> None:
    """Steps 10 and 11 rested; steps 12 to 15 of the longer run look ahead along what they left."""
    path = tmp_path / "ended.ckpt"
    fit(adamw, [scheduled_callback()]).save_checkpoint(path)
    longer = ema_nesterov(warmup=2, rest=2, total_steps=18)
    resumed = fit(adamw, [longer], num_epochs=6, ckpt_path=path)
    module = Toy(adamw)

    def step_size(t: int) -> float:
        return 0.5 ** (1 + t // 5) if 2 <= t < 10 or 12 <= t < 16 else 0.0

    (expected, expected_m), (untreated, _) = (
        reference.train(
            snapshot(module),
            batch_gradients(module, Batches(3, torch.float64).data.repeat(6, 1, 1)),
            adamw,
            num_steps=18,
            ema_decay=0.9,
            step_size=size,
            make_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 5, 0.5),
        )
        for size in (step_size, lambda t: step_size(t) if t < 12 else 0.0)
    )
    # Displacements are a thousandth of the parameters, which are rounded to float32.
    assert relative_error(directions_of(resumed), expected_m) < 1e-3
    assert relative_error(snapshot(resumed.lightning_module), expected[-1]) < 1e-5
    assert relative_error(untreated[-1], expected[-1]) > 1e-4


def test_another_decay_from_a_checkpoint_on_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "ended.ckpt"
    fit(adamw, [scheduled_callback()]).save_checkpoint(path)
    other = ema_nesterov(ema_decay=0.75, warmup=2, rest=2, total_steps=18)
    with pytest.warns(
        UserWarning, match=r"had ema_decay=0.9 so far and has 0.75 .* off for the next 40 steps"
    ):
        fit(adamw, [other], num_epochs=6, ckpt_path=path)


class Weighs(Callback):
    """Adds up the memory of all tensors after a step, each storage once. Unit: bytes."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step != 5:  # between two steps, in the middle of an epoch
            return
        gc.collect()
        # Compilers leave tensors of types of their own, which have no memory.
        own = (torch.Tensor, torch.nn.Parameter)
        tensors = [o for o in gc.get_objects() if type(o) in own and o.device.type == "cpu"]
        storages = [t.untyped_storage() for t in tensors]
        self.seen.append(sum({s.data_ptr(): s.nbytes() for s in storages}.values()))


def test_memory_between_steps_is_one_float32_element_more_for_each_parameter_element() -> None:
    """In the optimizer's state, and nowhere else."""
    in_state, in_all = [], []
    for own in ([], [ema_nesterov()]):
        weighs = Weighs()
        trainer = fit(adamw, [*own, weighs], num_epochs=2)
        states = [v for state in trainer.optimizers[0].state.values() for v in state.values()]
        in_state.append(sum(v.numel() * v.element_size() for v in states))
        in_all.append(weighs.seen)
        del trainer, states
    one_tensor = 4 * sum(p.numel() for p in Toy(adamw).parameters())
    assert in_state[1] - in_state[0] == one_tensor
    assert [b - a for a, b in zip(*in_all, strict=True)] == [one_tensor]
