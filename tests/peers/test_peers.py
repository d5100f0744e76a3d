"""The peers against references in float64, and the identities between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import Optimizer

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.peers import GPA, SNOO, Lookahead, ScheduleFree
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
Gradients = Callable[[list[Tensor], int], Sequence[Tensor]]


def train(
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


def start() -> tuple[list[Tensor], Gradients]:
    """The toy's initial parameters and its gradients, in float64."""
    model = Toy(adamw, dtype=torch.float64)
    of_batches = batch_gradients(model, Batches(NUM_STEPS, torch.float64).data)

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


def gpa_reference(make_optimizer: MakeOptimizer, mu_y: float, mu_x: float) -> list[Tensor]:
    x, gradients = start()
    z = [p.clone() for p in x]
    step = stepper(make_optimizer, x)
    for idx in range(NUM_STEPS):
        y = [mu_y * a + (1 - mu_y) * b for a, b in zip(x, z, strict=True)]
        stepped = step(y, gradients(y, idx))
        z = [b + c - a for b, c, a in zip(z, stepped, y, strict=True)]
        x = [mu_x * a + (1 - mu_x) * b for a, b in zip(x, z, strict=True)]
    return x


def snoo_reference(make_optimizer: MakeOptimizer, k: int, lr: float, mu: float) -> list[Tensor]:
    fast, gradients = start()
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


@pytest.mark.parametrize("make_optimizer", [sgd, momentum, adamw])
@pytest.mark.parametrize(("mu_y", "mu_x"), [(0.7, 0.99), (0.5, 0.9), (1.0, 0.9)])
def test_gpa_matches_the_reference(make_optimizer: MakeOptimizer, mu_y: float, mu_x: float) -> None:
    expected = gpa_reference(make_optimizer, mu_y, mu_x)
    assert relative_error(train(GPA(mu_y, mu_x), make_optimizer), expected) < 1e-10
    assert relative_error(train([], make_optimizer), expected) > 1e-3


@pytest.mark.parametrize("make_optimizer", [sgd, momentum, adamw])
@pytest.mark.parametrize(("k", "lr", "mu"), [(5, 0.8, 0.5), (7, 0.5, 0.9), (60, 0.7, 0.25)])
def test_snoo_matches_the_reference(
    make_optimizer: MakeOptimizer, k: int, lr: float, mu: float
) -> None:
    expected = snoo_reference(make_optimizer, k, lr, mu)
    assert relative_error(train(SNOO(k, lr, mu), make_optimizer), expected) < 1e-10
    assert relative_error(train([], make_optimizer), expected) > 1e-3


@pytest.mark.parametrize("alpha", [0.5, 1.5])
def test_lookahead_matches_the_reference_and_is_snoo_without_momentum(alpha: float) -> None:
    found = train(Lookahead(5, alpha))
    assert relative_error(found, snoo_reference(adamw, 5, alpha, 0.0)) < 1e-10
    assert equal(found, train(SNOO(5, alpha, 0.0)))
    assert not equal(found, train(SNOO(5, alpha, 0.1)))


def test_snoo_of_one_step_is_one_step_nesterov() -> None:
    """With K = 1 and outer rate 1 the fast weights are Nesterov's lookahead points."""
    mu = 0.6
    params, gradients = start()
    points: list[list[Tensor]] = []

    def remember(point: list[Tensor], idx: int) -> Sequence[Tensor]:
        points.append([p.clone() for p in point])
        return gradients(point, idx)

    reference.train(
        params, remember, sgd, num_steps=NUM_STEPS, ema_decay=0.0, step_size=lambda t: mu
    )
    found = train(SNOO(1, 1.0, mu), sgd, num_steps=NUM_STEPS - 1)
    assert relative_error(found, points[-1]) < 1e-10
    assert relative_error(train([], sgd, num_steps=NUM_STEPS - 1), points[-1]) > 1e-3


class Points(Callback):
    """Keeps what the parameters hold in every training step."""

    def __init__(self) -> None:
        self.points: list[list[Tensor]] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.points.append(snapshot(pl_module))


@pytest.mark.parametrize(("step_size", "ema_decay"), [(0.5, 0.9), (0.3, 0.99)])
def test_gpa_takes_its_gradients_where_ema_nesterov_does(
    step_size: float, ema_decay: float
) -> None:
    def scaled(factor: float) -> MakeOptimizer:
        return lambda params: torch.optim.AdamW(params, lr=1e-2 * factor, weight_decay=0.1)

    points, of_gpa = Points(), Points()
    train([ema_nesterov(lookahead_step_size=step_size, ema_decay=ema_decay), points], scaled(1.0))
    mu_x = ema_decay + (1 - ema_decay) * step_size
    train([GPA(step_size, mu_x), of_gpa], scaled(1 / (1 - step_size)))
    for first, second in zip(points.points, of_gpa.points, strict=True):
        assert relative_error(first, second) < 1e-10
    train([GPA(step_size, ema_decay), other := Points()], scaled(1 / (1 - step_size)))
    assert relative_error(points.points[-1], other.points[-1]) > 1e-6


PEERS: list[Callable[[], LookaheadCallback]] = [
    lambda: GPA(0.7, 0.9),
    lambda: SNOO(4, 0.8, 0.5),
    lambda: Lookahead(4, 0.5),
    lambda: ema_nesterov(ema_decay=0.0),
]


@pytest.mark.parametrize("make_peer", PEERS)
@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
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


@pytest.mark.parametrize("make_peer", [PEERS[0]])
def test_validation_and_checkpoints_see_the_average(
    make_peer: Callable[[], Callback], tmp_path: Path
) -> None:
    """With accumulation, in the middle of a window too; and looking changes nothing."""

    class Watch(Callback):
        def __init__(self) -> None:
            self.seen: list[list[Tensor]] = []

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            self.seen.append(snapshot(pl_module))
            trainer.save_checkpoint(tmp_path / "now.ckpt")
            saved = torch.load(tmp_path / "now.ckpt", weights_only=False)["state_dict"]
            assert equal(list(saved.values()), self.seen[-1])

    def run(callbacks: list[Callback], **kwargs: Any) -> list[Tensor]:
        model = Toy(adamw, dtype=torch.float64)
        trainer = make_trainer(
            [make_peer(), *callbacks], max_steps=10, accumulate_grad_batches=2, **kwargs
        )
        trainer.fit(model, loader(20, torch.float64), loader(1, torch.float64))
        return snapshot(model)

    points, watch = Points(), Watch()
    final = run([watch, points], val_check_interval=3)
    assert equal(final, run([], limit_val_batches=0))
    # The validation after batch 6, 3 steps, is followed by a step from another point.
    assert relative_error(watch.seen[1], points.points[3]) > 1e-4
    assert len(watch.seen) == 6


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
    from lightning.pytorch.plugins import MixedPrecision

    class Overflow(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            loss: Tensor = self(batch)
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


def free(params: Any) -> Optimizer:
    optimizer: Optimizer = schedulefree.AdamWScheduleFree(params, lr=1e-2)
    return optimizer


def test_schedule_free_is_evaluated_and_saved_at_the_average(tmp_path: Path) -> None:
    """As a loop by hand that follows the package's own instructions."""
    model = Toy(free)
    optimizer = free(model.parameters())
    for batch in Batches(10).data:
        optimizer.train()
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    gradient_point = snapshot(model)
    optimizer.eval()

    seen: list[list[Tensor]] = []

    class Watch(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(snapshot(pl_module))

    trained = Toy(free)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=10)
    trainer = make_trainer(
        [ScheduleFree(), Watch(), saver], max_steps=10, enable_checkpointing=True
    )
    trainer.fit(trained, loader(10), loader(1))
    assert equal(snapshot(trained), snapshot(model))
    [path] = tmp_path.glob("*.ckpt")
    saved = torch.load(path, weights_only=False)["state_dict"]
    for found in (seen[-1], list(saved.values())):
        assert relative_error(found, snapshot(model)) < 1e-6
        assert relative_error(found, gradient_point) > 1e-4


def test_schedule_free_resumes_bitwise(tmp_path: Path) -> None:
    def run(num_steps: int, checkpoint: str | None = None) -> list[Tensor]:
        model = Toy(free)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = make_trainer(
            [ScheduleFree(), saver], max_steps=num_steps, enable_checkpointing=True
        )
        trainer.fit(model, loader(4), ckpt_path=checkpoint)
        return snapshot(model)

    whole = run(12)
    assert equal(whole, run(12, str(tmp_path / "step=4.ckpt")))


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"needs optimizers with train\(\)"):
        make_trainer(ScheduleFree(), max_steps=1).fit(Toy(adamw), loader(1))
    with pytest.raises(MisconfigurationException, match="got 2: GPA, EMANesterov"):
        make_trainer([EMANesterov(), GPA()], max_steps=10).fit(Toy(adamw), loader(10))
    for make, message in [
        (lambda: GPA(mu_y=0.0), r"mu_y must be in \(0, 1\], got 0.0"),
        (lambda: GPA(mu_x=1.0), r"mu_x must be in \[0, 1\), got 1.0"),
        (lambda: SNOO(0), "num_inner_steps must be at least 1, got 0"),
        (lambda: SNOO(outer_lr=0.0), "outer_lr must be above 0, got 0.0"),
        (lambda: SNOO(outer_momentum=1.0), r"outer_momentum must be in \[0, 1\), got 1.0"),
        (lambda: Lookahead(alpha=-1.0), "alpha must be above 0, got -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
