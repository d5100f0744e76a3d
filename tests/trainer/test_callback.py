"""The callback in a real Trainer: the oracle, the leaks, the schedules, the logs."""

from __future__ import annotations

import math
import os
import pickle
import signal
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.core.lookahead import STEP_KEY
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
    muon,
    relative_error,
    sgd,
    snapshot,
)

MakeScheduler = Callable[[Optimizer], lr_scheduler.LRScheduler]


def iterates_of(module: Toy, callback: EMANesterov) -> list[Tensor]:
    """x, computed from what the parameters hold and the direction, in float64."""
    lookahead = callback._lookaheads[0]
    state = lookahead.base_optimizer.state
    return [
        p.detach().double()
        - lookahead._step_sizes.get(p, 0.0)
        * (state[p][DIRECTION_KEY].double() if DIRECTION_KEY in state.get(p, {}) else 0.0)
        for p in module.parameters()
    ]


class Recorder(Callback):
    """Copies what the parameters hold in the hooks it is told to look from."""

    def __init__(self, *hooks: str) -> None:
        self.seen: list[tuple[str, int, list[Tensor]]] = []
        for hook in hooks:
            setattr(self, hook, self._make(hook))

    def _make(self, hook: str) -> Callable[..., None]:
        def record(trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
            self.seen.append((hook, trainer.global_step, snapshot(pl_module)))

        return record


def trajectory_of(module: Toy, **kwargs: Any) -> list[list[Tensor]]:
    """The oracle's iterates for the toy's data."""
    accumulate = kwargs.pop("accumulate", 1)
    num_steps = kwargs["num_steps"]
    batches = Batches(num_steps * accumulate, torch.float64).data
    trajectory, _ = reference.train(
        snapshot(module),
        batch_gradients(module, batches, accumulate),
        module.make_optimizer,
        **kwargs,
    )
    return trajectory


def cosine(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.CosineAnnealingLR(optimizer, 250)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("make_scheduler", [None, cosine])
@pytest.mark.parametrize(
    ("make_optimizer", "dtype"),
    [
        *(
            (make, dtype)
            for make in (sgd, momentum, adamw)
            for dtype in (torch.float32, torch.float64)
        ),
        (muon, torch.float32),  # Muon orthogonalises in bfloat16: its oracle runs in float32
    ],
)
def test_two_hundred_steps_match_the_reference(
    make_optimizer: MakeOptimizer,
    make_scheduler: MakeScheduler | None,
    accumulate: int,
    dtype: torch.dtype,
) -> None:
    module = Toy(make_optimizer, dtype=dtype, make_scheduler=make_scheduler)
    lrs = [0.5 * (1 + math.cos(t * math.pi / 250)) for t in range(200)]

    def step_size(t: int) -> float:
        ratio = lrs[t] if make_scheduler else 1.0
        return 0.5 * ratio if 20 <= t < 170 else 0.0

    expected = trajectory_of(
        module,
        accumulate=accumulate,
        num_steps=200,
        ema_decay=0.95,
        step_size=step_size,
        make_scheduler=make_scheduler,
        dtype=torch.float32 if make_optimizer is muon else torch.float64,
    )
    trainer = make_trainer(
        EMANesterov(0.5, 0.95, warmup=20, rest=0.15),
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        precision="64-true" if dtype is torch.float64 else "32-true",
    )
    trainer.fit(module, loader(200 * accumulate, dtype))
    assert trainer.global_step == 200
    tolerance = 1e-4 if dtype is torch.float32 else 1e-9  # the promise
    assert relative_error(list(module.parameters()), expected[-1]) < tolerance
    assert relative_error(expected[-1], expected[100]) > 1e-3  # and the run went somewhere


@pytest.mark.parametrize("make_optimizer", [sgd, momentum, adamw, muon])
@pytest.mark.parametrize("kwargs", [{"lookahead_step_size": 0.0}, {"warmup": 6, "rest": 6}])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.filterwarnings("ignore:EMANesterov never looks ahead")
def test_zero_step_size_matches_no_callback_bitwise(
    make_optimizer: MakeOptimizer, kwargs: dict[str, Any], precision: str
) -> None:
    weights = []
    for callbacks in ([], [ema_nesterov(**kwargs)], [ema_nesterov()]):
        module = Toy(make_optimizer)
        make_trainer(callbacks, max_steps=12, precision=precision).fit(module, loader(12))
        weights.append(snapshot(module))
    assert equal(weights[0], weights[1])
    assert not equal(weights[0], weights[2])


def test_warmup_and_rest_match_no_callback_bitwise() -> None:
    plain, treated = Toy(adamw), Toy(adamw)
    recorders = [Recorder("on_train_batch_end"), Recorder("on_train_batch_end")]
    make_trainer([recorders[0]], max_steps=12).fit(plain, loader(12))
    make_trainer([recorders[1], ema_nesterov(warmup=5, rest=2)], max_steps=12).fit(
        treated, loader(12)
    )
    same = [equal(a[2], b[2]) for a, b in zip(recorders[0].seen, recorders[1].seen, strict=True)]
    assert same == [True] * 5 + [False] * 7


@pytest.mark.parametrize("ema_decay", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("kappa", [50, 1000])
def test_convex_rate_on_a_quadratic(ema_decay: float, kappa: int) -> None:
    # design: alpha = 1 / L, s = sqrt((1 - gamma) / kappa), worst-case rate 1 - s.
    s = ((1 - ema_decay) / kappa) ** 0.5
    beta = (1 - ema_decay - s) * (s - 1 / kappa) / ((1 - 1 / kappa) * (1 - ema_decay) * s)
    curvature = torch.logspace(0, torch.log10(torch.tensor(kappa)).item(), 30, dtype=torch.float64)

    class Quadratic(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.ones(30, dtype=torch.float64))
            self.norms: list[float] = []

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return 0.5 * (curvature * self.x.square()).sum()

        def on_train_batch_end(self, *args: Any) -> None:
            self.norms.append(self.x.detach().norm().item())

        def configure_optimizers(self) -> Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1.0 / kappa)

    module = Quadratic()
    num_steps = round(30 / s)  # the error falls by about e ** 30
    trainer = make_trainer(
        ema_nesterov(lookahead_step_size=beta, ema_decay=ema_decay), max_steps=num_steps
    )
    trainer.fit(module, loader(num_steps))
    late = round(0.8 * num_steps)
    rate = (module.norms[-1] / module.norms[late]) ** (1 / (num_steps - 1 - late))
    assert rate == pytest.approx(1 - s, rel=0.01)
    # The logarithm tells rates near 1 apart; a double root adds a factor of about the step count.
    assert torch.tensor(rate).log().item() == pytest.approx(
        torch.tensor(1 - s).log().item(), rel=0.1
    )
    assert rate < 1 - 1 / kappa  # plain gradient descent


OUTSIDE = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_end",
    "on_fit_end",
)


class Watcher(Recorder):
    """Checks in every hook that may look that the parameters hold x."""

    def __init__(self, callback: EMANesterov) -> None:
        super().__init__(*OUTSIDE)
        self.callback = callback


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_every_hook_outside_the_training_step_sees_the_iterate(order: int, accumulate: int) -> None:
    """Validation every three batches, also inside accumulation windows; callback first or last."""
    expected = trajectory_of(
        Toy(adamw), accumulate=accumulate, num_steps=6, ema_decay=0.9, step_size=lambda _: 0.5
    )
    module = Toy(adamw)
    recorder = Recorder(*OUTSIDE)
    callbacks = [recorder, ema_nesterov()] if order else [ema_nesterov(), recorder]
    trainer = make_trainer(
        callbacks, max_epochs=1, accumulate_grad_batches=accumulate, val_check_interval=3
    )
    trainer.fit(module, loader(6 * accumulate), loader(2))
    assert {hook for hook, _, _ in recorder.seen} == set(OUTSIDE)
    for hook, step, params in recorder.seen:
        # float32 training against the float64 oracle; y is 100 times farther from x.
        assert relative_error(params, expected[step]) < 1e-5, hook
    assert relative_error(expected[5], expected[6]) > 1e-3


@pytest.mark.parametrize("accumulate", [1, 4])
def test_looking_does_not_disturb_training(accumulate: int) -> None:
    quiet, watched = Toy(adamw), Toy(adamw)
    options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    make_trainer(ema_nesterov(), **options).fit(quiet, loader(16))
    recorder = Recorder(*OUTSIDE)
    make_trainer([ema_nesterov(), recorder], val_check_interval=3, **options).fit(
        watched, loader(16), loader(2)
    )
    assert equal(snapshot(quiet), snapshot(watched))
    assert len(recorder.seen) > 30


def test_validation_between_windows_sees_the_iterate_bit_for_bit() -> None:
    """Where no y was in memory, validation sees exactly what training without it leaves."""
    recorder, module = Recorder("on_validation_batch_start"), Toy(adamw)
    trainer = make_trainer([ema_nesterov(), recorder], max_epochs=1, val_check_interval=1)
    trainer.fit(module, loader(6), loader(1))
    for _, step, params in recorder.seen:
        stopped = Toy(adamw)
        make_trainer(ema_nesterov(), max_steps=step).fit(stopped, loader(6))
        assert equal(params, snapshot(stopped))
    assert [step for _, step, _ in recorder.seen] == [1, 2, 3, 4, 5, 6]


def saved_weights(path: Path) -> list[Tensor]:
    return list(torch.load(path, weights_only=False)["state_dict"].values())


SAVES_MID_WINDOW: dict[str, Callable[[Path], ModelCheckpoint]] = {
    "every_n_train_steps": lambda d: ModelCheckpoint(
        d, "{step}", every_n_train_steps=1, save_top_k=-1
    ),
    "monitor": lambda d: ModelCheckpoint(
        d, "{step}", every_n_train_steps=1, monitor="rising", mode="min", save_top_k=1
    ),
    "time": lambda d: ModelCheckpoint(
        d, "{step}", train_time_interval=timedelta(hours=1), save_top_k=-1
    ),
    "validation": lambda d: ModelCheckpoint(d, "{step}-{epoch}", save_top_k=-1, every_n_epochs=1),
}


@pytest.mark.parametrize("trigger", SAVES_MID_WINDOW)
def test_every_trigger_of_model_checkpoint_saves_the_iterate(trigger: str, tmp_path: Path) -> None:
    expected = trajectory_of(
        Toy(adamw), accumulate=4, num_steps=6, ema_decay=0.9, step_size=lambda _: 0.5
    )
    checkpoint = SAVES_MID_WINDOW[trigger](tmp_path)
    saved: list[tuple[int, bool, list[Tensor]]] = []

    class Spy(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("rising", float(batch_idx))
            if batch_idx % 8 == 5 and checkpoint._last_time_checked is not None:
                checkpoint._last_time_checked -= 7200.0  # two hours pass in the middle of a window
            return self(batch)  # type: ignore[no-any-return]

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            weights = [value.clone() for value in checkpoint["state_dict"].values()]
            mid_window = self.trainer.fit_loop._should_accumulate()
            saved.append((checkpoint["global_step"], mid_window, weights))

    module = Spy(adamw)
    trainer = make_trainer(
        [ema_nesterov(), checkpoint],
        max_epochs=1,
        accumulate_grad_batches=4,
        val_check_interval=6,
        enable_checkpointing=True,
    )
    trainer.fit(module, loader(24), loader(1))
    for step, _, weights in saved:
        assert relative_error(weights, expected[step]) < 1e-5
    assert len(saved) >= (1 if trigger == "monitor" else 3)
    if trigger in ("time", "validation"):
        assert any(mid_window for _, mid_window, _ in saved)
    undisturbed = Toy(adamw)
    make_trainer(ema_nesterov(), max_epochs=1, accumulate_grad_batches=4).fit(
        undisturbed, loader(24)
    )
    assert equal(snapshot(module), snapshot(undisturbed))
    files = list(tmp_path.glob("*.ckpt"))
    assert files
    for path in files:
        step = torch.load(path, weights_only=False)["global_step"]
        assert relative_error(saved_weights(path), expected[step]) < 1e-5


def test_monitored_checkpoint_saves_in_the_middle_of_a_window(tmp_path: Path) -> None:
    """A value that is not good enough is tried again at the next micro-batch."""
    expected = trajectory_of(
        Toy(adamw), accumulate=4, num_steps=6, ema_decay=0.9, step_size=lambda _: 0.5
    )
    mid_window: list[int] = []

    class Falling(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("score", 0.5 if batch_idx < 8 else 1.0 if batch_idx < 16 else 0.1)
            return self(batch)  # type: ignore[no-any-return]

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if self.trainer.fit_loop._should_accumulate():
                mid_window.append(checkpoint["global_step"])
                weights = list(checkpoint["state_dict"].values())
                assert relative_error(weights, expected[checkpoint["global_step"]]) < 1e-5

    checkpoint = ModelCheckpoint(tmp_path, monitor="score", every_n_train_steps=2, save_top_k=1)
    trainer = make_trainer(
        [ema_nesterov(), checkpoint],
        max_epochs=1,
        accumulate_grad_batches=4,
        enable_checkpointing=True,
    )
    trainer.fit(Falling(adamw), loader(24))
    assert mid_window[0] == 4


def test_save_checkpoint_between_forward_and_backward_saves_the_iterate(tmp_path: Path) -> None:
    expected = trajectory_of(Toy(adamw), num_steps=6, ema_decay=0.9, step_size=lambda _: 0.5)

    class SavesInside(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss: Tensor = self(batch)
            held = snapshot(self)
            self.trainer.save_checkpoint(tmp_path / f"{batch_idx}.ckpt")
            assert equal(held, snapshot(self))
            return loss

    module = SavesInside(adamw)
    make_trainer(ema_nesterov(), max_steps=6).fit(module, loader(6))
    for step in range(6):
        weights = saved_weights(tmp_path / f"{step}.ckpt")
        assert relative_error(weights, expected[step]) < 1e-5
    assert relative_error(expected[4], expected[5]) > 1e-3
    undisturbed = Toy(adamw)
    make_trainer(ema_nesterov(), max_steps=6).fit(undisturbed, loader(6))
    assert equal(snapshot(module), snapshot(undisturbed))


class Fails(Toy):
    """Raises in the forward pass of one batch, or after it."""

    error: BaseException = ZeroDivisionError("on purpose")
    after_forward = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch) if self.after_forward or batch_idx != 14 else torch.zeros(())
        if batch_idx == 14:
            raise self.error
        return loss


@pytest.mark.parametrize("after_forward", [False, True])
@pytest.mark.parametrize("error", [ZeroDivisionError("on purpose"), KeyboardInterrupt()])
def test_exception_leaves_and_saves_the_iterate(
    after_forward: bool, error: BaseException, tmp_path: Path
) -> None:
    """Batch 14 of windows of 4: in the middle of the fourth window."""
    expected = trajectory_of(
        Toy(adamw), accumulate=4, num_steps=3, ema_decay=0.9, step_size=lambda _: 0.5
    )
    module = Fails(adamw)
    module.error, module.after_forward = error, after_forward
    recorder = Recorder("on_exception")
    checkpoint = OnExceptionCheckpoint(tmp_path, "stopped")
    trainer = make_trainer(
        [recorder, checkpoint, ema_nesterov()],
        max_epochs=1,
        accumulate_grad_batches=4,
        enable_checkpointing=True,
    )
    with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else ZeroDivisionError):
        trainer.fit(module, loader(24))
    assert relative_error(snapshot(module), expected[3]) < 1e-5
    assert relative_error(recorder.seen[0][2], expected[3]) < 1e-5
    assert relative_error(saved_weights(tmp_path / "stopped.ckpt"), expected[3]) < 1e-5
    assert "training_step" not in vars(trainer.strategy)
    assert "save_checkpoint" not in vars(trainer)


class StopsMidWindow(Callback):
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if args[-1] == 13:
            trainer.should_stop = True


def test_early_stop_in_the_middle_of_a_window_ends_at_the_iterate(tmp_path: Path) -> None:
    expected = trajectory_of(
        Toy(adamw), accumulate=4, num_steps=3, ema_decay=0.9, step_size=lambda _: 0.5
    )
    module, recorder = Toy(adamw), Recorder("on_validation_start", "on_train_end")
    trainer = make_trainer(
        [StopsMidWindow(), ema_nesterov(), recorder, ModelCheckpoint(tmp_path, "end")],
        max_epochs=1,
        accumulate_grad_batches=4,
        enable_checkpointing=True,
    )
    trainer.fit(module, loader(24), loader(1))
    assert trainer.global_step == 3
    assert [hook for hook, _, _ in recorder.seen] == ["on_validation_start", "on_train_end"]
    for params in (snapshot(module), recorder.seen[0][2], saved_weights(tmp_path / "end.ckpt")):
        assert relative_error(params, expected[3]) < 1e-5


def test_sigterm_in_the_middle_of_a_window_saves_the_iterate(tmp_path: Path) -> None:
    expected = trajectory_of(
        Toy(adamw), accumulate=4, num_steps=3, ema_decay=0.9, step_size=lambda _: 0.5
    )

    class Terminated(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 13:
                os.kill(os.getpid(), signal.SIGTERM)
            return self(batch)  # type: ignore[no-any-return]

    module = Terminated(adamw)
    trainer = make_trainer(
        [OnExceptionCheckpoint(tmp_path, "stopped"), ema_nesterov()],
        max_epochs=1,
        accumulate_grad_batches=4,
        enable_checkpointing=True,
    )
    with pytest.raises(SIGTERMException):
        trainer.fit(module, loader(24))
    assert relative_error(snapshot(module), expected[3]) < 1e-5
    assert relative_error(saved_weights(tmp_path / "stopped.ckpt"), expected[3]) < 1e-5


def test_signal_handler_that_saves_in_the_middle_of_a_step_saves_the_iterate(
    tmp_path: Path,
) -> None:
    """SLURM's requeue handler calls save_checkpoint at any point, also inside the optimizer."""

    class Interrupted(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            assert closure is not None
            with torch.enable_grad():
                loss = closure()
            for group in self.param_groups:
                for idx, p in enumerate(group["params"]):
                    if idx == 1 and self.save is not None:
                        self.save()
                    p.add_(p.grad, alpha=-group["lr"])
            return loss

        save: Callable[[], None] | None = None

    def make(params: Iterable[Tensor]) -> Optimizer:
        return Interrupted(params, lr=0.05)

    class Module(Toy):
        def on_train_start(self) -> None:
            optimizer = self.optimizers().optimizer
            optimizer.save = lambda: self.trainer.save_checkpoint(tmp_path / "mid.ckpt")

    module, recorder = Module(make), Recorder("on_train_batch_end")
    make_trainer([ema_nesterov(), recorder], max_steps=4).fit(module, loader(4))
    undisturbed = Toy(sgd)
    make_trainer(ema_nesterov(), max_steps=4).fit(undisturbed, loader(4))
    assert relative_error(snapshot(module), snapshot(undisturbed)) < 1e-6
    first, second = saved_weights(tmp_path / "mid.ckpt")
    assert torch.equal(first, recorder.seen[3][2][0])  # stepped before the signal
    torch.testing.assert_close(second, recorder.seen[2][2][1])  # still to be stepped: x, not y


def test_on_train_batch_start_that_ends_the_epoch_leaves_the_iterate() -> None:
    class Ends(Toy):
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
            return -1 if batch_idx == 6 else None

    expected = trajectory_of(
        Toy(adamw), accumulate=4, num_steps=1, ema_decay=0.9, step_size=lambda _: 0.5
    )
    module, recorder = Ends(adamw), Recorder("on_train_epoch_end")
    trainer = make_trainer([recorder, ema_nesterov()], max_epochs=1, accumulate_grad_batches=4)
    trainer.fit(module, loader(12))
    assert relative_error(recorder.seen[0][2], expected[1]) < 1e-5
    assert relative_error(snapshot(module), expected[1]) < 1e-5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("ema_first", [False, True])
def test_step_skipped_by_the_scaler_leaves_the_iterate(fused: bool, ema_first: bool) -> None:
    class Overflows(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self(batch) * (float("inf") if batch_idx == 3 else 1.0)  # type: ignore[no-any-return]

    module = Overflows(lambda params: torch.optim.AdamW(params, lr=1e-2, fused=fused))
    recorder = Recorder("on_train_batch_end")
    averaging, callback = EMAWeightAveraging(decay=0.5), ema_nesterov()
    seen: list[list[Tensor]] = []
    averaging.on_train_batch_end = (  # type: ignore[method-assign]
        lambda trainer, pl_module, *args: seen.append(snapshot(pl_module))
    )
    order = [callback, averaging] if ema_first else [averaging, callback]
    trainer = make_trainer(
        [*order, recorder],
        max_steps=6,
        plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))],
    )
    m: list[Tensor] = []
    recorder.on_before_zero_grad = (  # type: ignore[method-assign]
        lambda trainer, pl_module, optimizer: m.append(
            torch.cat([s[DIRECTION_KEY].flatten() for s in optimizer.state.values()])
            if optimizer.state
            else torch.zeros(1)
        )
    )
    trainer.fit(module, loader(6))
    assert trainer.global_step == 6
    assert relative_error(recorder.seen[3][2], recorder.seen[2][2]) < 1e-7  # skipped: x stays
    assert relative_error(recorder.seen[4][2], recorder.seen[3][2]) > 1e-3  # and goes on
    assert relative_error([m[4]], [m[3]]) == 0  # m stays
    for one, other in zip(seen, recorder.seen, strict=True):
        assert equal(one, other[2])


def test_training_step_that_returns_none_changes_nothing() -> None:
    class Skips(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            return None if batch_idx % 3 == 2 else self(batch)

    for accumulate in (1, 2):
        recorder = Recorder("on_train_batch_end")
        module = Skips(adamw)
        trainer = make_trainer(
            [ema_nesterov(), recorder], max_epochs=1, accumulate_grad_batches=accumulate
        )
        trainer.fit(module, loader(12))
        weights = [params for _, _, params in recorder.seen]
        if accumulate == 1:
            assert relative_error(weights[5], weights[4]) < 1e-7
            assert relative_error(weights[6], weights[5]) > 1e-4
        assert all(torch.isfinite(p).all() for p in module.parameters())


# Manual optimization.


class Manual(Toy):
    """Two optimizers, stepped in turn as in a GAN, with a closure or without."""

    def __init__(
        self, *, closure: bool = False, steps: int = 1, make_first: MakeOptimizer = sgd
    ) -> None:
        super().__init__(adamw)
        self.automatic_optimization = False
        self.make_first = make_first
        self.use_closure = closure
        self.steps = steps
        self.callback: EMANesterov | None = None

    def configure_optimizers(self) -> Any:
        return [self.make_first(self.hidden.parameters()), adamw(self.out.parameters())]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            for repeat in range(self.steps):
                if repeat and self.callback is not None:
                    self.callback.extrapolate(optimizer)
                self.toggle_optimizer(optimizer)

                def closure(optimizer: Any = optimizer) -> Tensor:
                    optimizer.zero_grad()
                    loss: Tensor = self(batch)
                    self.manual_backward(loss)
                    return loss

                if self.use_closure:
                    optimizer.step(closure=closure)
                else:
                    closure()
                    optimizer.step()
                self.untoggle_optimizer(optimizer)


def reference_manual(
    num_steps: int,
    repeats: int = 1,
    make_first: MakeOptimizer = sgd,
    dtype: torch.dtype = torch.float64,
) -> list[list[Tensor]]:
    """The oracle of :class:`Manual`: both at y at the start, each stepped in its turn."""
    module = Toy(adamw)
    p = [q.detach().to(dtype).requires_grad_() for q in module.parameters()]
    x = [q.detach().clone() for q in p]
    m = [torch.zeros_like(q) for q in p]
    optimizers = [make_first([p[0]]), adamw([p[1]])]
    trajectory = [[q.clone() for q in x]]
    batches = Batches(num_steps, torch.float64).data

    def look_ahead(idx: int) -> None:
        with torch.no_grad():
            p[idx].copy_(x[idx] + 0.5 * m[idx])

    for t in range(num_steps):
        look_ahead(0)
        look_ahead(1)
        for idx in (0, 1):
            for repeat in range(repeats):
                if repeat:
                    look_ahead(idx)
                gradient = batch_gradients(module, batches)(p, t)[idx]
                p[idx].grad = gradient
                optimizers[idx].step()
                m[idx] = 0.9 * m[idx] + 0.1 * (p[idx].detach() - x[idx])
                x[idx] = p[idx].detach().clone()
        trajectory.append([q.clone() for q in x])
    return trajectory


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_manual_optimization_with_two_optimizers_matches_the_reference(
    closure: bool, steps: int
) -> None:
    module, recorder = Manual(closure=closure, steps=steps), Recorder("on_train_batch_end")
    callback = ema_nesterov()
    module.callback = callback
    make_trainer([recorder, callback], max_epochs=1).fit(module, loader(20))
    expected = reference_manual(20, repeats=steps)
    for idx, (_, _, params) in enumerate(recorder.seen):
        assert relative_error(params, expected[idx + 1]) < 1e-5
    assert len(recorder.seen) == 20


def test_muon_next_to_adamw_matches_the_reference() -> None:
    module, recorder = Manual(make_first=muon), Recorder("on_train_batch_end")
    make_trainer([recorder, ema_nesterov()], max_epochs=1).fit(module, loader(20))
    # Muon orthogonalises in bfloat16: its oracle runs in float32.
    expected = reference_manual(20, make_first=muon, dtype=torch.float32)
    for idx, (_, _, params) in enumerate(recorder.seen):
        assert relative_error(params, expected[idx + 1]) < 1e-4
    assert len(recorder.seen) == 20
    assert relative_error(expected[-1], reference_manual(20)[-1]) > 1e-3


def test_second_step_without_extrapolate_has_no_lookahead() -> None:
    module = Manual(steps=2)
    make_trainer(ema_nesterov(), max_epochs=1).fit(module, loader(20))
    assert relative_error(snapshot(module), reference_manual(20, repeats=2)[-1]) > 1e-4
    with pytest.raises(
        RuntimeError, match="must be called during fit with an optimizer of the module"
    ):
        ema_nesterov().extrapolate(sgd(module.parameters()))


def test_manual_accumulation_over_batches_and_epochs_keeps_one_window() -> None:
    class Accumulates(Toy):
        def __init__(self) -> None:
            super().__init__(sgd)
            self.automatic_optimization = False

        def on_validation_model_zero_grad(self) -> None:
            pass  # Lightning would drop the gradients of the open window

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(self(batch) / 4)
            self.count = getattr(self, "count", 0) + 1
            if self.count % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()

    module = Accumulates()
    recorder = Recorder("on_train_batch_end", "on_validation_start", "on_train_epoch_end")
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


def test_lbfgs_in_automatic_optimization_trains() -> None:
    def lbfgs(params: Iterable[Tensor]) -> Optimizer:
        return torch.optim.LBFGS(params, lr=0.1, max_iter=3)

    losses = []
    for callbacks in ([], [ema_nesterov(lookahead_step_size=0.3)]):
        module = Toy(lbfgs)
        make_trainer(callbacks, max_steps=10).fit(module, loader(10))
        losses.append(torch.stack([module(b) for b in Batches(10).data]).mean().item())
    start = torch.stack([Toy(lbfgs)(b) for b in Batches(10).data]).mean().item()
    assert max(losses) < 0.8 * start
    assert losses[0] != losses[1]


# Other callbacks beside it.


@pytest.mark.parametrize("ema_first", [False, True])
@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_weight_averaging_averages_iterates(ema_first: bool, kind: str) -> None:
    """The average is that of the recorded iterates, in either order of the callbacks."""
    averaging: Callback = (
        EMAWeightAveraging(decay=0.5)
        if kind == "ema"
        else StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2, annealing_epochs=1)
    )
    recorder = Recorder("on_train_batch_end")
    callback = ema_nesterov()
    order = [callback, averaging] if ema_first else [averaging, callback]
    module = Toy(adamw)
    make_trainer([*order, recorder], max_epochs=5).fit(module, loader(6), loader(1))
    weights = [[p.double() for p in params] for _, _, params in recorder.seen]
    if kind == "ema":
        expected = weights[0]
        for params in weights[1:]:
            expected = [0.5 * a + 0.5 * b for a, b in zip(expected, params, strict=True)]
    else:
        ends = weights[5:29:6]  # what the epochs 1 to 4 start from
        expected = [torch.stack(ps).mean(0) for ps in zip(*ends, strict=True)]
    assert relative_error(snapshot(module), expected) < 1e-5
    assert relative_error(snapshot(module), weights[-1]) > 1e-4


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_batch_norm_epoch_of_swa_runs_at_the_average() -> None:
    class WithBatchNorm(Toy):
        def __init__(self) -> None:
            super().__init__(adamw)
            self.norm = nn.BatchNorm1d(4)
            self.in_update: list[list[Tensor]] = []

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if self.trainer.fit_loop._skip_backward:
                self.in_update.append(snapshot(self))
            return self(torch.cat([self.norm(batch[:, :4]), batch[:, 4:]], dim=1))  # type: ignore[no-any-return]

    module = WithBatchNorm()
    swa, recorder = (
        StochasticWeightAveraging(1e-2, swa_epoch_start=1),
        Recorder("on_train_epoch_start"),
    )
    make_trainer([swa, ema_nesterov(), recorder], max_epochs=3).fit(module, loader(4))
    starts = [params for _, _, params in recorder.seen[:3]]
    average = [torch.stack(ps).mean(0) for ps in zip(*starts, strict=True)]
    assert len(module.in_update) == 4
    for params in module.in_update:
        assert relative_error(params, average) < 1e-6


def test_backbone_finetuning_adds_parameters_that_get_a_direction() -> None:
    class Finetuned(Toy):
        def __init__(self) -> None:
            super().__init__(adamw)
            self.backbone = self.hidden

        def configure_optimizers(self) -> Any:
            return adamw([p for p in self.parameters() if p.requires_grad])

    module = Finetuned()
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    trainer = make_trainer([finetuning, ema_nesterov()], max_epochs=3)
    before = module.hidden.weight.detach().clone()
    trainer.fit(module, loader(4))
    assert not torch.equal(module.hidden.weight, before)
    assert sum(DIRECTION_KEY in s for s in trainer.optimizers[0].state.values()) == 2


def test_learning_rate_finder_leaves_a_fresh_run(tmp_path: Path) -> None:
    """The search runs without lookahead; the reference is the learning rate that it found."""

    class Tunable(Toy):
        def __init__(self) -> None:
            super().__init__(adamw)
            self.lr = 1e-4

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    for order in (0, 1):
        module, callback = Tunable(), ema_nesterov()
        finder = LearningRateFinder(num_training_steps=20)
        callbacks = [callback, finder] if order else [finder, callback]
        trainer = make_trainer(
            callbacks, max_steps=5, default_root_dir=tmp_path, enable_checkpointing=True
        )
        recorder = Recorder("on_train_start")
        trainer.callbacks.append(recorder)
        trainer.fit(module, loader(30))
        assert equal(recorder.seen[0][2], snapshot(Tunable()))
        group = trainer.optimizers[0].param_groups[0]
        assert module.lr != 1e-4
        assert group["ema_nesterov_max_lr"] == pytest.approx(group["lr"])
        assert group[STEP_KEY] == 5


def test_learning_rate_search_in_the_middle_of_training_restores_everything(tmp_path: Path) -> None:
    class Search(LearningRateFinder):
        def on_fit_start(self, *args: Any) -> None:
            pass

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                before = snapshot(pl_module)
                self.lr_find(trainer, pl_module)
                assert equal(before, snapshot(pl_module))
                assert trainer.optimizers[0].param_groups[0][STEP_KEY] == 6

    class Tunable(Toy):
        lr = 1e-2

    module = Tunable(adamw)
    trainer = make_trainer(
        [Search(num_training_steps=10, update_attr=True), ema_nesterov()],
        max_epochs=2,
        default_root_dir=tmp_path,
        enable_checkpointing=True,
    )
    trainer.fit(module, loader(6))
    assert trainer.optimizers[0].param_groups[0][STEP_KEY] == 12


def test_batch_size_finder_leaves_a_fresh_run(tmp_path: Path) -> None:
    class Sized(Toy):
        def __init__(self) -> None:
            super().__init__(adamw)
            self.batch_size = 2

        def train_dataloader(self) -> Any:
            rows = Batches(64).data[:, 0]
            return torch.utils.data.DataLoader(rows, batch_size=self.batch_size)

        def val_dataloader(self) -> Any:
            return loader(1)

    module, recorder = Sized(), Recorder("on_train_start")
    trainer = make_trainer(
        [ema_nesterov(), BatchSizeFinder(max_trials=2, steps_per_trial=2), recorder],
        max_epochs=1,
        default_root_dir=tmp_path,
        enable_checkpointing=True,
    )
    trainer.fit(module)
    assert module.batch_size > 2
    assert equal(recorder.seen[0][2], snapshot(Sized()))
    assert trainer.optimizers[0].param_groups[0][STEP_KEY] == trainer.global_step


def test_gradient_accumulation_scheduler_counts_the_steps_of_each_epoch() -> None:
    module = Toy(adamw)
    trainer = make_trainer(
        [GradientAccumulationScheduler({0: 1, 1: 4}), ema_nesterov(rest=0.25)], max_epochs=3
    )
    sizes: list[float] = []
    trainer.callbacks.append(
        LambdaCallback(
            on_before_optimizer_step=lambda t, m, o: sizes.append(
                max(callback_of(t)._lookaheads[0]._step_sizes.values(), default=0.0)
            )
        )
    )
    trainer.fit(module, loader(8))
    # 8 + 2 + 2 steps; the first has no direction yet, the last three rest.
    assert sizes == [0.0] + [0.5] * 8 + [0.0] * 3


def callback_of(trainer: Trainer) -> EMANesterov:
    return next(c for c in trainer.callbacks if isinstance(c, EMANesterov))


def test_cyclic_learning_rate_is_measured_against_its_own_maximum() -> None:
    module = Toy(
        sgd,
        make_scheduler=lambda o: lr_scheduler.CyclicLR(
            o, 1e-3, 1e-2, step_size_up=4, cycle_momentum=False
        ),
    )
    trainer = make_trainer(ema_nesterov(), max_steps=2)
    trainer.fit(module, loader(2))
    assert trainer.optimizers[0].param_groups[0]["ema_nesterov_max_lr"] == 1e-2


# Life cycle.


def test_fit_twice_goes_on_and_leaves_nothing_behind() -> None:
    module, callback = Toy(adamw), ema_nesterov()
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(module, loader(4))
    first = trainer.optimizers[0]
    assert not first._optimizer_step_pre_hooks
    assert "training_step" not in vars(trainer.strategy)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader(4))
    assert trainer.global_step == 16
    assert trainer.optimizers[0].param_groups[0][STEP_KEY] == 16
    make_trainer(callback, max_epochs=1).fit(Toy(adamw), loader(4))  # another Trainer


def test_a_wrapped_save_checkpoint_is_put_back() -> None:
    trainer = make_trainer(ema_nesterov(), max_steps=1)
    mine = trainer.save_checkpoint
    trainer.save_checkpoint = mine  # type: ignore[method-assign]
    trainer.fit(Toy(adamw), loader(1))
    assert vars(trainer)["save_checkpoint"] is mine


def test_several_optimizers_are_logged_apart(tmp_path: Path) -> None:
    trainer = make_trainer(
        ema_nesterov(), max_epochs=1, logger=CSVLogger(tmp_path), log_every_n_steps=4
    )
    trainer.fit(Manual(), loader(8))
    tags = set(trainer.logged_metrics)
    assert {"ema_nesterov/alignment/SGD", "ema_nesterov/alignment/AdamW"} <= tags


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logged_values_are_those_of_the_logged_step(accumulate: int, tmp_path: Path) -> None:
    seen: list[tuple[int, dict[str, float]]] = []

    class Logger(CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            assert step is not None
            seen.append((step, dict(metrics)))

    expected = trajectory_of(
        Toy(adamw), accumulate=accumulate, num_steps=12, ema_decay=0.9, step_size=lambda _: 0.5
    )
    trainer = make_trainer(
        ema_nesterov(),
        max_epochs=1,
        logger=Logger(tmp_path),
        log_every_n_steps=5,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(Toy(adamw), loader(12 * accumulate))
    logged = [(s, m) for s, m in seen if "ema_nesterov/step_size" in m]
    assert [step for step, _ in logged] == [4, 9]
    for step, metrics in logged:
        moved = [b - a for a, b in zip(expected[step], expected[step + 1], strict=True)]
        norm = torch.cat([d.flatten() for d in moved]).norm().item()
        assert metrics["ema_nesterov/displacement_norm"] == pytest.approx(norm, rel=1e-3)
        assert metrics["ema_nesterov/step_size"] == 0.5
        assert 0 < metrics["ema_nesterov/alignment"] <= 1


def test_nothing_is_measured_without_a_logger() -> None:
    callback = ema_nesterov()
    asked: list[bool] = []
    recorder = LambdaCallback(
        on_before_optimizer_step=lambda *_: asked.append(callback._lookaheads[0].will_measure)
    )
    make_trainer([callback, recorder], max_steps=4, log_every_n_steps=1).fit(Toy(adamw), loader(4))
    assert asked == [False] * 4


def test_lightning_cli_builds_it_from_yaml(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer:\n"
        "  max_steps: 2\n  accelerator: cpu\n  logger: false\n  enable_checkpointing: false\n"
        "  enable_progress_bar: false\n  enable_model_summary: false\n"
        "  callbacks:\n"
        "  - class_path: lightning_ema_nesterov.EMANesterov\n"
        "    init_args: {lookahead_step_size: 0.3, ema_decay: 0.95, warmup: 1, rest: 0.0}\n"
    )
    from lightning.pytorch.demos.boring_classes import BoringModel

    cli = LightningCLI(
        BoringModel, save_config_callback=None, args=["fit", "--config", str(config)]
    )
    callback = callback_of(cli.trainer)
    assert (callback.lookahead_step_size, callback.ema_decay) == (0.3, 0.95)
    assert (callback.warmup, callback.rest) == (1, 0.0)
    assert isinstance(callback.warmup, int)


# Bad input.


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lookahead_step_size": 1.0}, r"lookahead_step_size must be in \[0, 1\), got 1.0"),
        ({"lookahead_step_size": -0.5}, r"lookahead_step_size must be in \[0, 1\), got -0.5"),
        ({"ema_decay": 1}, r"ema_decay must be in \[0, 1\), got 1"),
        ({"ema_decay": "0.9"}, r"ema_decay must be in \[0, 1\), got '0.9'"),
        ({"warmup": -1}, "warmup must be at least 0 optimizer steps, got -1"),
        ({"rest": 1.5}, r"rest must be in \[0, 1\] as a fraction of the run \(a float\), got 1.5"),
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused_at_once(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMANesterov(**kwargs)


@pytest.mark.parametrize(
    ("callback", "trainer_kwargs", "message"),
    [
        (EMANesterov(warmup=8, rest=3), {"max_steps": 10}, r"got 8 \+ 3 steps in a run of 10"),
        (EMANesterov(), {"max_epochs": -1}, "warmup = 0.3 is a fraction of the run"),
        (EMANesterov(warmup=0, rest=5), {"max_epochs": -1}, "rest = 5 counts from the end"),
    ],
)
def test_schedule_that_does_not_fit_the_run_is_refused(
    callback: EMANesterov, trainer_kwargs: dict[str, Any], message: str
) -> None:
    module = Toy(adamw)
    before = snapshot(module)
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(callback, **trainer_kwargs).fit(module, loader(20))
    assert equal(before, snapshot(module))


def test_endless_run_with_counts_is_fine() -> None:
    trainer = make_trainer([EMANesterov(warmup=1, rest=0), Timer("00:00:00:01")], max_epochs=-1)
    trainer.fit(Toy(adamw), loader(4))
    assert trainer.global_step > 4


def test_fast_dev_run_needs_no_fitting_schedule() -> None:
    make_trainer(EMANesterov(warmup=100, rest=50), fast_dev_run=True).fit(Toy(adamw), loader(4))


@pytest.mark.parametrize("strategy", ["DeepSpeedStrategy", "SingleDeviceXLAStrategy"])
def test_unsupported_strategies_are_refused(strategy: str) -> None:
    trainer = make_trainer(EMANesterov(), max_steps=10)
    trainer.strategy.__class__ = type(strategy, (type(trainer.strategy),), {})
    with pytest.raises(MisconfigurationException, match=f"does not support {strategy}"):
        trainer.fit(Toy(adamw), loader(10))


def test_two_callbacks_are_refused() -> None:
    with pytest.raises(
        MisconfigurationException,
        match="One lookahead callback must be in the list, got 2",
    ):
        make_trainer([EMANesterov(), EMANesterov()], max_steps=10).fit(Toy(adamw), loader(10))


def test_callback_can_be_pickled_for_spawned_processes() -> None:
    callback = pickle.loads(pickle.dumps(EMANesterov(0.25)))
    assert callback.lookahead_step_size == 0.25
    make_trainer(callback, max_steps=4).fit(Toy(adamw), loader(4))


def test_full_disk_while_saving_raises_and_leaves_the_iterate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The save fails in the middle of a window, after the parameters were returned for it."""
    expected = trajectory_of(
        Toy(adamw), accumulate=4, num_steps=2, ema_decay=0.9, step_size=lambda _: 0.5
    )

    class Saves(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 9:
                self.trainer.save_checkpoint(tmp_path / "full.ckpt")
            return self(batch)  # type: ignore[no-any-return]

    def no_space(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    module = Saves(adamw)
    trainer = make_trainer(ema_nesterov(), max_epochs=1, accumulate_grad_batches=4)
    monkeypatch.setattr(trainer.strategy, "save_checkpoint", no_space)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(module, loader(12))
    assert relative_error(snapshot(module), expected[2]) < 1e-5


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_module_without_optimizer_is_refused() -> None:
    class Empty(Toy):
        def configure_optimizers(self) -> Any:
            return None

    with pytest.raises(MisconfigurationException, match="needs an optimizer"):
        make_trainer(EMANesterov(), max_steps=10).fit(Empty(adamw), loader(10))


def test_optimizer_that_is_not_of_torch_is_refused() -> None:
    class Duck:
        def __init__(self, params: Iterable[Tensor]) -> None:
            self.param_groups = [{"params": list(params), "lr": 0.1}]
            self.defaults: dict[str, Any] = {}
            self.state: dict[Any, Any] = {}

        def step(self, closure: Any = None) -> None: ...
        def zero_grad(self) -> None: ...
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    module = Toy(Duck)
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got .*Duck"):
        make_trainer(EMANesterov(), max_steps=10).fit(module, loader(10))


@pytest.mark.parametrize(
    "kwargs", [{"lookahead_step_size": 0.0}, {"warmup": 5, "rest": 5}, {"warmup": 1.0, "rest": 0}]
)
def test_configuration_that_does_nothing_warns_once(kwargs: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="never looks ahead in this run") as record:
        make_trainer(EMANesterov(**kwargs), max_steps=10).fit(Toy(adamw), loader(10))
    assert sum("never looks ahead" in str(w.message) for w in record) == 1
