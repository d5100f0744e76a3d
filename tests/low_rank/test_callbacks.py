"""The callbacks in a Trainer, beside EMA-Nesterov and in any order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_ema_nesterov import EMANesterov, attach_ema_nesterov
from lightning_ema_nesterov.low_rank import (
    MomentumReset,
    WeightRefactorization,
    attach_momentum_reset,
    attach_weight_refactorization,
)
from tests.low_rank.toy import LowRankToy, loss_of, rarely
from tests.toys import equal, largest_difference, make_trainer, snapshot

MakeCallbacks = Callable[[], list[Callback]]


def method() -> EMANesterov:
    return EMANesterov(ema_decay=0.9, warmup=0, rest=0)


ORDERS: dict[str, MakeCallbacks] = {
    "method first": lambda: [method(), MomentumReset(3, 2), WeightRefactorization(3)],
    "method last": lambda: [WeightRefactorization(3), MomentumReset(3, 2), method()],
    "method between": lambda: [MomentumReset(3, 2), method(), WeightRefactorization(3)],
}


class LitLowRank(LightningModule):
    def __init__(self, make: Callable[[Any], Optimizer] | None = None, seed: int = 0) -> None:
        super().__init__()
        self.model = LowRankToy(seed=seed)
        self.make = make or (lambda params: AdamW(params, lr=0.02))

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return loss_of(self.model, int(batch))

    @override
    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def fit(
    module: LightningModule,
    callbacks: list[Callback],
    num_steps: int,
    path: Any = None,
    **kwargs: Any,
) -> Trainer:
    trainer = make_trainer(callbacks, max_steps=num_steps, **kwargs)
    start = torch.load(path, weights_only=True)["global_step"] if path else 0
    data: Any = DataLoader(list(range(start, 20)), batch_size=1)  # type: ignore[arg-type]
    trainer.fit(module, data, ckpt_path=path, weights_only=True if path else None)
    return trainer


def expected(num_steps: int, *, with_others: bool = True) -> list[Tensor]:
    """The same in a loop of one's own."""
    model = LowRankToy()
    optimizer = AdamW(model.parameters(), lr=0.02)
    attach_ema_nesterov(optimizer, model, ema_decay=0.9, warmup=0, rest=0)
    if with_others:
        attach_momentum_reset(optimizer, every_n_steps=3, recovery_steps=2)
        attach_weight_refactorization(optimizer, model, every_n_steps=3)
    for step_idx in range(num_steps):
        optimizer.zero_grad()
        loss_of(model, step_idx).backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer.step()
    return snapshot(model)


@pytest.mark.parametrize("order", rarely(ORDERS, "method last"))
def test_trainer_equals_a_loop_of_ones_own_in_any_order(order: str) -> None:
    module = LitLowRank()
    fit(module, ORDERS[order](), 8)
    assert equal(snapshot(module), expected(8))
    assert largest_difference(snapshot(module), expected(8, with_others=False)) > 1e-3


@pytest.mark.parametrize("order", rarely(ORDERS, "method last"))
@pytest.mark.parametrize("num_before", rarely([3, 4, 5], 3))
def test_resume_is_bitwise(order: str, num_before: int, tmp_path: Path) -> None:
    first = LitLowRank()
    trainer = fit(first, ORDERS[order](), num_before)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    second = LitLowRank(seed=1)
    fit(second, ORDERS[order](), 8, tmp_path / "part.ckpt")
    assert equal(snapshot(second), expected(8))
    assert not equal(snapshot(first), expected(8))


def test_checkpoint_made_without_them_counts_on(tmp_path: Path) -> None:
    plain = LitLowRank()
    fit(plain, [], 2).save_checkpoint(tmp_path / "part.ckpt")
    module = LitLowRank(seed=1)
    fit(module, [MomentumReset(3, 2), WeightRefactorization(3)], 5, tmp_path / "part.ckpt")
    whole = LitLowRank()
    fit(whole, [MomentumReset(3, 2), WeightRefactorization(3)], 5)
    assert equal(snapshot(module), snapshot(whole))


def test_steps_are_counted_and_not_batches() -> None:
    seen: list[int] = []

    class Look(Callback):
        @override
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            [optimizer] = trainer.optimizers
            seen.append(int(next(iter(optimizer.state.values()))["step"]) if optimizer.state else 0)

    module = LitLowRank()
    fit(module, [MomentumReset(2, 0), Look()], 4, accumulate_grad_batches=2)
    assert seen == [0, 1, 1, 2, 2, 1, 1, 2]


def test_loggers_and_schedulers_see_the_rate_without_the_factor() -> None:
    rates: list[float] = []

    class Scheduled(LitLowRank):
        @override
        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        @override
        def on_train_batch_end(self, *args: Any) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    fit(Scheduled(), [MomentumReset(2, 2)], 5)
    assert rates == [0.5**t for t in range(1, 6)]


class TwoOptimizers(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = LowRankToy()

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
            self.manual_backward(loss_of(self.model, int(batch)))
            optimizer.step()

    @override
    def configure_optimizers(self) -> list[Optimizer]:
        return [
            AdamW(self.model.first.parameters(), lr=0.02),
            AdamW([*self.model.second.parameters(), *self.model.out.parameters()], lr=0.02),
        ]


def test_several_optimizers_in_manual_optimization() -> None:
    module = TwoOptimizers()
    fit(module, [method(), WeightRefactorization(4), MomentumReset(4, 0)], 8)
    for layer in module.model.layers:
        left, right = layer.B.detach(), layer.A.detach()
        torch.testing.assert_close(left.mT @ left, right @ right.mT, rtol=1e-9, atol=1e-9)


class Halves(TwoOptimizers):
    @override
    def configure_optimizers(self) -> list[Optimizer]:
        first = self.model.first
        rest = [p for p in self.parameters() if p is not first.B]
        return [AdamW([first.B], lr=0.02), AdamW(rest, lr=0.02)]


class Dense(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(5, 2)

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        raise AssertionError("trained")

    @override
    def configure_optimizers(self) -> Optimizer:
        return SGD(self.parameters(), lr=0.1)


class Flat(LitLowRank):
    @override
    def configure_optimizers(self) -> Any:
        self.model.first.B = nn.Parameter(self.model.first.B.detach().flatten())
        return super().configure_optimizers()

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        raise AssertionError("trained")


@pytest.mark.parametrize(
    ("module", "callback", "message"),
    [
        (Dense(), WeightRefactorization(), r"WeightRefactorization: module .* to_low_rank_\(model"),
        (Halves(), WeightRefactorization(), "Both factors of a low-rank layer"),
        (Flat(), WeightRefactorization(), r"factors of 'model.first' .*--strategy ddp"),
        (LitLowRank(Adagrad), MomentumReset(), "MomentumReset: optimizer must make its state"),
    ],
)
def test_what_cannot_work_is_one_error_before_the_first_step(
    module: LightningModule, callback: Callback, message: str
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, [callback], 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightRefactorization(0), "every_n_steps must be a whole number of at least 1"),
        (lambda: MomentumReset(0), "every_n_steps must be a whole number of at least 1"),
        (lambda: MomentumReset(5, 6), "recovery_steps must be at most every_n_steps, 5, got 6"),
    ],
)
def test_arguments_are_checked_when_the_callback_is_made(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class Fails(LitLowRank):
    @override
    def on_before_zero_grad(self, optimizer: Any) -> None:
        if self.global_step == 4:
            raise MemoryError("on purpose")


def test_exception_takes_everything_off() -> None:
    module = Fails()
    trainer = make_trainer(ORDERS["method last"](), max_steps=8)
    data: Any = DataLoader(list(range(20)), batch_size=1)  # type: ignore[arg-type]
    with pytest.raises(MemoryError):
        trainer.fit(module, data)
    [optimizer] = trainer.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert all("ema_nesterov_direction" in state for state in optimizer.state.values())
    # The way back from y rounds, on some CPUs only; y is 1e-2 from x.
    assert largest_difference(snapshot(module), expected(4)) < 1e-15
