"""The numbers: trajectory, direction, schedules, and no change where the step size is 0."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import DataLoader, Subset

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.core import reference
from tests.toys import (
    Batches,
    MakeOptimizer,
    MakeScheduler,
    Recorder,
    Toy,
    adamw,
    batch_gradients,
    ema_directions,
    ema_nesterov,
    equal,
    loader,
    make_trainer,
    momentum,
    relative_error,
    sgd,
    snapshot,
    trajectory_of,
)
from tests.versions import muon


def cosine(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.CosineAnnealingLR(optimizer, 250)


OPTIMIZERS = (sgd, momentum, adamw, muon)
QUICK_RUNS = (
    (adamw, torch.float32, cosine, 4),
    (sgd, torch.float64, None, 1),
    (muon, torch.float32, None, 1),
)
ALL_RUNS = [
    (make_optimizer, dtype, make_scheduler, accumulate)
    for make_optimizer in OPTIMIZERS
    for dtype in (torch.float32, torch.float64)
    for make_scheduler in (None, cosine)
    for accumulate in (1, 4)
]


@pytest.mark.usefixtures("exact_muon")
@pytest.mark.parametrize(
    ("make_optimizer", "dtype", "make_scheduler", "accumulate"),
    [
        pytest.param(
            *run,
            marks=() if run in QUICK_RUNS else (pytest.mark.slow, pytest.mark.no_cover),
        )
        for run in ALL_RUNS
    ],
)
def test_two_hundred_steps_match_the_reference(
    make_optimizer: MakeOptimizer,
    dtype: torch.dtype,
    make_scheduler: MakeScheduler | None,
    accumulate: int,
) -> None:
    module = Toy(make_optimizer, dtype=dtype, make_scheduler=make_scheduler)
    lrs = [0.5 * (1 + math.cos(t * math.pi / 250)) for t in range(200)]

    def step_size(t: int) -> float:
        ratio = lrs[t] if make_scheduler else 1.0
        return 0.5 * ratio if 20 <= t < 170 else 0.0

    options: dict[str, Any] = {"num_steps": 200, "make_scheduler": make_scheduler}
    options |= {"accumulate": accumulate, "ema_decay": 0.95}
    expected = trajectory_of(module, step_size=step_size, **options)
    untreated = trajectory_of(module, step_size=lambda _: 0.0, **{**options, "num_steps": 100})
    trainer = make_trainer(
        EMANesterov(0.5, 0.95, warmup=20, rest=0.15),
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        precision="64-true" if dtype is torch.float64 else "32-true",
    )
    trainer.fit(module, loader(200 * accumulate, dtype))
    assert trainer.global_step == 200
    # Rounding of 200 steps; Muon amplifies that of matrices with a small singular value.
    tolerance = 1e-4 if dtype is torch.float32 else 1e-9
    assert relative_error(snapshot(module), expected[-1]) < tolerance
    assert relative_error(untreated[-1], expected[100]) > 1e-3


def test_negative_step_size_matches_the_reference() -> None:
    """The gradient is then taken nearer to the average of the iterates."""
    module, recorder = Toy(adamw), Recorder("on_train_batch_end")
    callback = ema_nesterov(lookahead_step_size=-0.2, warmup=2)
    make_trainer([callback, recorder], max_steps=12).fit(module, loader(12))
    expected, opposite = (
        trajectory_of(Toy(adamw), num_steps=12, step_size=partial(size_after_warmup, beta))
        for beta in (-0.2, 0.2)
    )
    for params, x in zip(recorder.params, expected[1:], strict=True):
        assert relative_error(params, x) < 1e-5  # float32 against float64
    assert relative_error(opposite[-1], expected[-1]) > 1e-3


def size_after_warmup(beta: float, t: int) -> float:
    return beta if t >= 2 else 0.0


class Directions(Callback):
    """Copies the direction after each batch, from the optimizer's own state."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        state = trainer.optimizers[0].state
        self.seen.append([state[p][DIRECTION_KEY].clone() for p in pl_module.parameters()])


def test_direction_is_in_the_state_after_every_step_to_the_end_of_the_run() -> None:
    """Also in the warmup and in the rest, where nothing looks ahead along it."""
    module, recorder, directions = Toy(adamw), Recorder("on_train_batch_end"), Directions()
    callback = ema_nesterov(warmup=3, rest=0.4)
    start = snapshot(module)
    make_trainer([callback, recorder, directions], max_steps=15).fit(module, loader(15))
    expected = ema_directions([start, *recorder.params])[1:]
    assert len(directions.seen) == 15
    for m, expected_m in zip(directions.seen, expected, strict=True):
        # Displacements are a few thousandths of the parameters, which are rounded to float32.
        assert relative_error(m, expected_m) < 1e-3
    assert relative_error(directions.seen[8], directions.seen[14]) > 0.1


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("kwargs", [{"lookahead_step_size": 0.0}, {"warmup": 6, "rest": 6}])
@pytest.mark.parametrize(
    "make_optimizer",
    [pytest.param(o, marks=() if o is adamw else pytest.mark.slow) for o in OPTIMIZERS],
)
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
    plain, treated = Recorder("on_train_batch_end"), Recorder("on_train_batch_end")
    make_trainer([plain], max_steps=12).fit(Toy(adamw), loader(12))
    callback = ema_nesterov(warmup=5, rest=2)
    make_trainer([treated, callback], max_steps=12).fit(Toy(adamw), loader(12))
    same = [equal(a, b) for a, b in zip(plain.params, treated.params, strict=True)]
    assert same == [True] * 5 + [False] * 7


class Restarted(Toy):
    """Without lookahead, from parameters and a state of the optimizer that are given."""

    def __init__(self, trained: Toy, state: dict[str, Any]) -> None:
        super().__init__(adamw)
        self.load_state_dict(trained.state_dict())
        self.optimizer_state = state

    def configure_optimizers(self) -> Optimizer:
        optimizer = adamw(self.parameters())
        optimizer.load_state_dict(self.optimizer_state)
        return optimizer


def test_rest_matches_the_base_optimizer_from_where_it_began_bitwise() -> None:
    begun = Toy(adamw)
    trainer = make_trainer(ema_nesterov(total_steps=12, rest=4), max_steps=8)
    trainer.fit(begun, loader(8))
    rested, alone = Toy(adamw), Restarted(begun, trainer.optimizers[0].state_dict())
    make_trainer(ema_nesterov(total_steps=12, rest=4), max_steps=12).fit(rested, loader(12))
    last_four = DataLoader(Subset(Batches(12), range(8, 12)), batch_size=None)
    make_trainer(max_steps=4).fit(alone, last_four)
    assert equal(snapshot(rested), snapshot(alone))
    never_rested = Toy(adamw)
    make_trainer(ema_nesterov(), max_steps=12).fit(never_rested, loader(12))
    assert not equal(snapshot(rested), snapshot(never_rested))


@pytest.mark.parametrize("ema_decay", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(
    "kappa", [50, pytest.param(1000, marks=(pytest.mark.slow, pytest.mark.no_cover))]
)
def test_convex_rate_on_a_quadratic(ema_decay: float, kappa: int) -> None:
    # alpha = 1 / L, s = sqrt((1 - gamma) / kappa): the worst-case rate is 1 - s.
    s = ((1 - ema_decay) / kappa) ** 0.5
    beta = (1 - ema_decay - s) * (s - 1 / kappa) / ((1 - 1 / kappa) * (1 - ema_decay) * s)
    curvature = torch.logspace(0, math.log10(kappa), 30, dtype=torch.float64)

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
    callback = ema_nesterov(lookahead_step_size=beta, ema_decay=ema_decay)
    make_trainer(callback, max_steps=num_steps).fit(module, loader(num_steps))
    late = round(0.8 * num_steps)
    rate = (module.norms[-1] / module.norms[late]) ** (1 / (num_steps - 1 - late))
    assert rate == pytest.approx(1 - s, rel=0.01)
    # The logarithm tells rates near 1 apart; a double root adds a factor of about the step count.
    assert math.log(rate) == pytest.approx(math.log(1 - s), rel=0.1)
    assert rate < 1 - 1 / kappa  # plain gradient descent


@pytest.mark.parametrize("skipped", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_without_a_loss_do_not_count(accumulate: int, skipped: int) -> None:
    """A training step that returns None adds no gradient; a step without any changes nothing.

    Also where it is the first: AdamW makes its state in the first step with gradients.
    """

    class Skips(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            return None if batch_idx % 3 == skipped else self.forward(batch)

    module, recorder = Skips(adamw), Recorder("on_train_batch_end")
    batches = Batches(12, torch.float64).data
    by_batch = batch_gradients(module, batches)

    def gradients(params: list[Tensor], step_idx: int) -> list[Tensor | None]:
        window = range(step_idx * accumulate, (step_idx + 1) * accumulate)
        rows = [by_batch(params, idx) for idx in window if idx % 3 != skipped]
        if not rows:
            return [None] * len(params)
        return [torch.stack(list(column)).sum(0) / accumulate for column in zip(*rows, strict=True)]

    expected, _ = reference.train(
        snapshot(module),
        gradients,
        adamw,
        num_steps=12 // accumulate,
        ema_decay=0.9,
        step_size=lambda _: 0.5,
    )
    trainer = make_trainer(
        [ema_nesterov(), recorder], max_epochs=1, accumulate_grad_batches=accumulate
    )
    trainer.fit(module, loader(12))
    for _, step, params in recorder.seen:
        assert relative_error(params, expected[step]) < 1e-5  # float32 against float64
    assert equal(expected[skipped], expected[skipped + 1]) is (accumulate == 1)
    assert relative_error(expected[-1], expected[-3]) > 1e-3


def test_cyclic_learning_rate_is_measured_against_its_own_maximum() -> None:
    """It starts at a tenth of it: so does the step size."""

    def cyclic(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
        return lr_scheduler.CyclicLR(optimizer, 5e-3, 5e-2, step_size_up=4, cycle_momentum=False)

    module, recorder = Toy(sgd, make_scheduler=cyclic), Recorder("on_train_batch_end")
    ratios = [0.1 + 0.9 * (1 - abs(t - 4) / 4) for t in range(8)]
    run: dict[str, Any] = {"num_steps": 8, "make_scheduler": cyclic}
    expected = trajectory_of(module, step_size=lambda t: 0.5 * ratios[t], **run)
    against_the_start = trajectory_of(module, step_size=lambda _: 0.5, **run)
    make_trainer([ema_nesterov(), recorder], max_steps=8).fit(module, loader(8))
    for params, x in zip(recorder.params, expected[1:], strict=True):
        assert relative_error(params, x) < 1e-5  # float32 against float64
    assert relative_error(against_the_start[-1], expected[-1]) > 1e-3


def test_cyclic_learning_rate_also_where_a_checkpoint_has_no_method(tmp_path: Path) -> None:
    def cyclic(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
        return lr_scheduler.CyclicLR(optimizer, 5e-3, 5e-2, step_size_up=4, cycle_momentum=False)

    trainer = make_trainer(max_steps=2)
    trainer.fit(Toy(sgd, make_scheduler=cyclic), loader(8))
    path = tmp_path / "without.ckpt"
    trainer.save_checkpoint(path)
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(ema_nesterov(), max_steps=4, logger=logger, log_every_n_steps=1)
    trainer.fit(Toy(sgd, make_scheduler=cyclic), loader(8), ckpt_path=path)
    # The third step has nothing to look ahead along; the fourth is three quarters up from a tenth.
    step_size = trainer.logged_metrics["ema_nesterov/step_size"]
    assert float(step_size) == pytest.approx(0.5 * 0.775)
