"""The peers against references in float64, and the identities between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.peers import GPA, SNOO, Lookahead
from lightning_ema_nesterov.trainer.base_callback import LookaheadCallback
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

NUM_STEPS = 60
MOST_SLOW = [*(pytest.param(make, marks=pytest.mark.slow) for make in (sgd, momentum)), adamw]
Gradients = Callable[[list[Tensor], int], Sequence[Tensor]]


def trained(
    callback: Callback | Sequence[Callback],
    make_optimizer: MakeOptimizer = adamw,
    *,
    num_steps: int = NUM_STEPS,
    dtype: torch.dtype = torch.float64,
    **kwargs: Any,
) -> list[Tensor]:
    model = Toy(make_optimizer, dtype=dtype)
    make_trainer(callback, max_steps=num_steps, **kwargs).fit(model, loader(num_steps, dtype))
    return snapshot(model)


def toy_problem(accumulate: int = 1) -> tuple[list[Tensor], Gradients]:
    """The toy's initial parameters and its gradients over each window, in float64."""
    model = Toy(adamw, dtype=torch.float64)
    batches = Batches(NUM_STEPS * accumulate, torch.float64).data
    of_batches = batch_gradients(model, batches, accumulate)

    def gradients(point: list[Tensor], idx: int) -> Sequence[Tensor]:
        found = of_batches([p.detach().requires_grad_() for p in point], idx)
        return [grad for grad in found if grad is not None]

    return snapshot(model), gradients


def stepper(make_optimizer: MakeOptimizer, like: list[Tensor]) -> Callable[..., list[Tensor]]:
    """The base optimizer as a function of a point and its gradient."""
    params = [torch.nn.Parameter(p.clone()) for p in like]
    optimizer = make_optimizer(params)

    def step(point: list[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        for p, value, grad in zip(params, point, grads, strict=True):
            p.data.copy_(value)
            p.grad = grad
        optimizer.step()
        return [p.detach().clone() for p in params]

    return step


def gpa_reference(
    make_optimizer: MakeOptimizer, mu_y: float, mu_x: float, accumulate: int = 1
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Return the averages x_0, x_1, ... and the points y_0, y_1, ... of the gradients."""
    x, gradients = toy_problem(accumulate)
    z = [p.clone() for p in x]
    step = stepper(make_optimizer, x)
    averages, points = [x], []
    for idx in range(NUM_STEPS):
        y = [mu_y * a + (1 - mu_y) * b for a, b in zip(x, z, strict=True)]
        stepped = step(y, gradients(y, idx))
        z = [b + c - a for b, c, a in zip(z, stepped, y, strict=True)]
        x = [mu_x * a + (1 - mu_x) * b for a, b in zip(x, z, strict=True)]
        averages.append(x)
        points.append(y)
    return averages, points


def snoo_reference(make_optimizer: MakeOptimizer, k: int, lr: float, mu: float) -> list[Tensor]:
    fast, gradients = toy_problem()
    slow = [p.clone() for p in fast]
    buffers = [torch.zeros_like(p) for p in fast]
    step = stepper(make_optimizer, fast)
    for idx in range(NUM_STEPS):
        fast = step(fast, gradients(fast, idx))
        if idx % k == k - 1:
            moved = [s - f for s, f in zip(slow, fast, strict=True)]
            buffers = [mu * b + d for b, d in zip(buffers, moved, strict=True)]
            slow = [s - lr * (d + mu * b) for s, d, b in zip(slow, moved, buffers, strict=True)]
            fast = [s.clone() for s in slow]
    return fast


@pytest.mark.parametrize("make_optimizer", MOST_SLOW)
@pytest.mark.parametrize(("mu_y", "mu_x"), [(0.7, 0.99), (0.5, 0.9), (1.0, 0.9)])
def test_gpa_matches_the_reference(make_optimizer: MakeOptimizer, mu_y: float, mu_x: float) -> None:
    expected = gpa_reference(make_optimizer, mu_y, mu_x)[0][-1]
    assert relative_error(trained(GPA(mu_y, mu_x), make_optimizer), expected) < 1e-10
    assert relative_error(trained([], make_optimizer), expected) > 1e-3


@pytest.mark.parametrize("make_optimizer", MOST_SLOW)
@pytest.mark.parametrize(("k", "lr", "mu"), [(5, 0.8, 0.5), (7, 0.5, 0.9), (60, 0.7, 0.25)])
def test_snoo_matches_the_reference(
    make_optimizer: MakeOptimizer, k: int, lr: float, mu: float
) -> None:
    expected = snoo_reference(make_optimizer, k, lr, mu)
    assert relative_error(trained(SNOO(k, lr, mu), make_optimizer), expected) < 1e-10
    assert relative_error(trained([], make_optimizer), expected) > 1e-3


@pytest.mark.parametrize("alpha", [0.5, 1.5])
def test_lookahead_matches_the_reference_and_is_snoo_without_momentum(alpha: float) -> None:
    found = trained(Lookahead(5, alpha))
    assert relative_error(found, snoo_reference(adamw, 5, alpha, 0.0)) < 1e-10
    assert equal(found, trained(SNOO(5, alpha, 0.0)))
    assert not equal(found, trained(SNOO(5, alpha, 0.1)))


def test_snoo_of_one_step_is_one_step_nesterov() -> None:
    """With K = 1 and outer rate 1 the fast weights are Nesterov's lookahead points."""
    mu = 0.6
    params, gradients = toy_problem()
    points: list[list[Tensor]] = []

    def remember(point: list[Tensor], idx: int) -> Sequence[Tensor]:
        points.append([p.clone() for p in point])
        return gradients(point, idx)

    reference.train(
        params, remember, sgd, num_steps=NUM_STEPS, ema_decay=0.0, step_size=lambda t: mu
    )
    found = trained(SNOO(1, 1.0, mu), sgd, num_steps=NUM_STEPS - 1)
    assert relative_error(found, points[-1]) < 1e-10
    assert relative_error(trained([], sgd, num_steps=NUM_STEPS - 1), points[-1]) > 1e-3


class Points(Callback):
    """Keeps what the parameters hold in every training step."""

    def __init__(self) -> None:
        self.points: list[list[Tensor]] = []

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        self.points.append(snapshot(pl_module))


@pytest.mark.parametrize(("step_size", "ema_decay"), [(0.5, 0.9), (0.3, 0.99)])
def test_gpa_takes_its_gradients_where_ema_nesterov_does(
    step_size: float, ema_decay: float
) -> None:
    def scaled(factor: float) -> MakeOptimizer:
        return lambda params: torch.optim.AdamW(params, lr=1e-2 * factor, weight_decay=0.1)

    points, of_gpa = Points(), Points()
    trained([ema_nesterov(lookahead_step_size=step_size, ema_decay=ema_decay), points], scaled(1.0))
    mu_x = ema_decay + (1 - ema_decay) * step_size
    trained([GPA(step_size, mu_x), of_gpa], scaled(1 / (1 - step_size)))
    for first, second in zip(points.points, of_gpa.points, strict=True):
        assert relative_error(first, second) < 1e-10
    trained([GPA(step_size, ema_decay), other := Points()], scaled(1 / (1 - step_size)))
    assert relative_error(points.points[-1], other.points[-1]) > 1e-6


PEERS: list[Callable[[], LookaheadCallback]] = [
    lambda: GPA(0.7, 0.9),
    lambda: SNOO(4, 0.8, 0.5),
    lambda: Lookahead(4, 0.5),
    lambda: ema_nesterov(ema_decay=0.0),
]


@pytest.mark.parametrize("make_peer", PEERS)
@pytest.mark.parametrize("make_optimizer", [pytest.param(sgd, marks=pytest.mark.slow), adamw])
def test_resumed_run_is_bitwise_the_same(
    make_peer: Callable[[], Callback], make_optimizer: MakeOptimizer, tmp_path: Path
) -> None:
    def run(num_steps: int, checkpoint: str | None = None) -> list[Tensor]:
        model = Toy(make_optimizer)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10, save_top_k=-1)
        trainer = make_trainer([make_peer(), saver], max_steps=num_steps, enable_checkpointing=True)
        trainer.fit(model, loader(5), ckpt_path=checkpoint)
        return snapshot(model)

    whole = run(20)
    resumed = run(20, str(tmp_path / "step=10.ckpt"))
    assert equal(whole, resumed)
    assert not equal(whole, run(10))


class SavesInValidation(Callback):
    """Copies what validation sees and what a checkpoint made there holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: list[tuple[int, list[Tensor]]] = []
        self.saved: list[list[Tensor]] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append((trainer.global_step, snapshot(pl_module)))
        trainer.save_checkpoint(self.path)
        saved = torch.load(self.path, weights_only=False)["state_dict"]
        self.saved.append(list(saved.values()))


def test_validation_and_checkpoints_see_the_average(tmp_path: Path) -> None:
    """With accumulation, in the middle of a window too; and looking changes nothing."""

    def run(callbacks: list[Callback], **kwargs: Any) -> list[Tensor]:
        model = Toy(adamw, dtype=torch.float64)
        trainer = make_trainer(
            [GPA(0.7, 0.9), *callbacks], max_steps=10, accumulate_grad_batches=2, **kwargs
        )
        trainer.fit(model, loader(20, torch.float64), loader(1, torch.float64))
        return snapshot(model)

    watch = SavesInValidation(tmp_path / "now.ckpt")
    final = run([watch], val_check_interval=3)
    assert equal(final, run([], limit_val_batches=0))
    averages, points = gpa_reference(adamw, 0.7, 0.9, accumulate=2)
    assert [step for step, _ in watch.seen] == [1, 3, 4, 6, 7, 9]  # three of them in a window
    for (step, params), saved in zip(watch.seen, watch.saved, strict=True):
        assert relative_error(params, averages[step]) < 1e-10
        assert equal(params, saved)
        assert relative_error(points[step], averages[step]) > 1e-4


def test_peers_keep_what_they_state() -> None:
    def kept(callback: Callback) -> set[str]:
        model = Toy(adamw)
        trainer = make_trainer(callback, max_steps=3)
        trainer.fit(model, loader(3))
        return {key for state in trainer.optimizers[0].state.values() for key in state}

    base = {"step", "exp_avg", "exp_avg_sq"}
    assert kept(GPA()) - base == {"gpa_direction"}
    assert kept(Lookahead()) - base == {"slow_weights"}
    assert kept(SNOO()) - base == {"slow_weights", "slow_momentum"}


def test_step_that_the_scaler_skips_changes_nothing_but_the_count() -> None:
    """A skipped step that is the last of K still ends with an outer step."""

    class Overflow(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            loss = self.forward(batch)
            return loss * float("inf") if batch_idx == 3 else loss

    def run(num_steps: int) -> list[Tensor]:
        model = Overflow(sgd)
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        make_trainer(Lookahead(4, 0.5), max_steps=num_steps, plugins=[plugin]).fit(model, loader(8))
        return snapshot(model)

    first, before, after = snapshot(Toy(sgd)), run(3), run(4)
    expected = [(a + b) / 2 for a, b in zip(first, before, strict=True)]
    assert relative_error(after, expected) < 1e-6
    assert relative_error(before, expected) > 1e-3


def test_second_lookahead_callback_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="got 2: GPA, EMANesterov"):
        make_trainer([EMANesterov(), GPA()], max_steps=10).fit(Toy(adamw), loader(10))


@pytest.mark.parametrize(
    ("make_peer", "kwargs", "message"),
    [
        (GPA, {"mu_y": 0.0}, r"mu_y must be in \(0, 1\], got 0.0"),
        (GPA, {"mu_x": 1.0}, r"mu_x must be in \[0, 1\), got 1.0"),
        (SNOO, {"num_inner_steps": 0}, "num_inner_steps must be at least 1, got 0"),
        (SNOO, {"outer_lr": 0.0}, "outer_lr must be above 0, got 0.0"),
        (SNOO, {"outer_momentum": 1.0}, r"outer_momentum must be in \[0, 1\), got 1.0"),
        (Lookahead, {"alpha": -1.0}, "alpha must be above 0, got -1.0"),
    ],
)
def test_wrong_arguments_are_named(
    make_peer: Callable[..., LookaheadCallback], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_peer(**kwargs)


@pytest.mark.parametrize("callback", [SNOO(2, 0.7, 0.5), Lookahead(2, 0.5)])
def test_parameter_that_is_frozen_later_stays(callback: Callback) -> None:
    class Freezes(Callback):
        weight: Tensor | None = None

        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, *args: object
        ) -> None:
            if trainer.global_step == 5:
                hidden: Any = pl_module.hidden
                hidden.requires_grad_(False)
                self.weight = hidden.weight.detach().clone()

    module, freezes = Toy(momentum), Freezes()
    make_trainer([callback, freezes], max_epochs=1).fit(module, loader(12))
    assert freezes.weight is not None
    assert torch.equal(module.hidden.weight, freezes.weight)
