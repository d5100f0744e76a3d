"""The compiled kernel, and where passes may be joined; the promises are in test_lookahead.py."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import Optimizer

from lightning_ema_nesterov import attach_ema_nesterov
from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.rules import ema_joined as one_pass
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY, EMADirections
from lightning_ema_nesterov.rules.ema_joined import JoinedDirections
from tests.core import reference
from tests.toys import (
    Manual,
    Toy,
    adamw,
    ema_nesterov,
    equal,
    loader,
    make_trainer,
    relative_error,
    sgd,
    snapshot,
)
from tests.versions import EMAWeightAveraging

SHAPES = [(330, 200), (33,), (256, 256), (3, 2**15)]  # all but the second are worth a kernel call


def start(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [nn.Parameter(value.to(dtype)) for value in values]


def gradients(params: Iterable[Tensor], step_idx: int) -> list[Tensor]:
    return [0.3 * p + p.cos() + 0.1 * (step_idx % 7) for p in params]


def train(
    optimizer: Optimizer, directions: EMADirections, num_steps: int, **kwargs: Any
) -> Lookahead:
    lookahead = Lookahead(directions, LookaheadSchedule(0.5, **kwargs)).attach()
    params = optimizer.param_groups[0]["params"]
    for step_idx in range(num_steps):
        lookahead.extrapolate()
        for p, gradient in zip(
            params, gradients([p.detach() for p in params], step_idx), strict=True
        ):
            p.grad = gradient
        optimizer.step()
    return lookahead


def directions_of(optimizer: Optimizer) -> list[Tensor]:
    return [entry[DIRECTION_KEY] for entry in optimizer.state_dict()["state"].values()]


@pytest.mark.slow
@pytest.mark.parametrize("ends_late", [False, True])
def test_compiled_and_default_paths_agree_after_two_hundred_steps(ends_late: bool) -> None:
    schedule = {"warmup": 20}
    params, plain = start(), start()
    by_hand = adamw(plain)
    train(by_hand, EMADirections(by_hand, 0.99), 200, **schedule)
    optimizer = adamw(params)
    train(optimizer, JoinedDirections(optimizer, 0.99, ends_late=ends_late), 200, **schedule)
    assert relative_error(params, plain) < 1e-6
    exact, exact_m = reference.train(
        start(),
        gradients,
        adamw,
        num_steps=200,
        ema_decay=0.99,
        step_size=lambda t: 0.5 if t >= 20 else 0.0,
    )
    # A float32 direction has lost that much against float64, compiled or not.
    errors = [relative_error(directions_of(o), exact_m) for o in (optimizer, by_hand)]
    assert max(errors) < 5e-6
    assert relative_error(params, exact[-1]) < 1e-5
    untreated = start()
    by_hand = adamw(untreated)
    train(by_hand, EMADirections(by_hand, 0.99), 200, warmup=200, total_steps=200)
    assert relative_error(untreated, plain) > 1e-3


def test_nothing_is_compiled_again_when_the_step_size_or_the_model_changes() -> None:
    params = start()
    optimizer = sgd(params)
    lookahead = train(optimizer, JoinedDirections(optimizer, 0.9, ends_late=True), 4)
    before = dict(counters["stats"])
    for lr in (0.02, 0.03, 0.01):
        for group in optimizer.param_groups:
            group["lr"] = lr
        lookahead.extrapolate()
        lookahead.retract()
        lookahead.extrapolate()
        optimizer.step()
    other = sgd([nn.Parameter(torch.randn(7, 2**15)), nn.Parameter(torch.randn(2**17))])
    train(other, JoinedDirections(other, 0.99), 6, warmup=2, rest=2, total_steps=6)
    assert dict(counters["stats"]) == before
    assert before["unique_graphs"] >= 1


def test_the_kernel_takes_large_tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counting(fold: Tensor, iterate: Tensor, coefficients: Tensor) -> None:
        sizes.append(fold.numel())

    monkeypatch.setattr(one_pass, "_compiled", counting)
    params = start()
    optimizer = sgd(params)
    train(optimizer, JoinedDirections(optimizer, 0.9), 2)
    assert sizes == [330 * 200, 256 * 256, 3 * 2**15]
    sizes.clear()
    narrow = [nn.Parameter(p.detach().bfloat16()) for p in params]
    turned = [nn.Parameter(torch.zeros(2**15, 3).t())]
    for chosen in (narrow, turned):
        optimizer = sgd(chosen)
        train(optimizer, JoinedDirections(optimizer, 0.9), 2)
    assert sizes == []


def test_without_a_compiler_one_warning_is_given_and_the_numbers_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*tensors: Tensor) -> None:
        raise RuntimeError("No C++ compiler\nand a long text")

    monkeypatch.setattr(one_pass, "_compiled", fails)
    params, plain = start(torch.float64), start(torch.float64)
    optimizer = sgd(params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(optimizer, JoinedDirections(optimizer, 0.9, ends_late=True), 5)
    [warning] = caught
    assert "compile=True needs a compiler" in str(warning.message)
    assert str(warning.message).endswith("RuntimeError: No C++ compiler")
    optimizer = sgd(plain)
    train(optimizer, EMADirections(optimizer, 0.9), 5)
    assert relative_error(params, plain) < 1e-13


def test_state_dict_holds_the_direction_in_a_window_and_between_steps() -> None:
    for num_steps in (3, 4):
        params = start(torch.float64)
        optimizer = sgd(params)
        lookahead = train(optimizer, JoinedDirections(optimizer, 0.9, ends_late=True), num_steps)
        twin = start(torch.float64)
        expected = sgd(twin)
        train(expected, EMADirections(expected, 0.9), num_steps)
        raw = [optimizer.state[p][DIRECTION_KEY].clone() for p in params]
        assert relative_error(raw, directions_of(expected)) > 1.0  # the end waits
        if num_steps == 4:
            lookahead.extrapolate()
            assert relative_error(params, twin) > 1e-3
        assert relative_error(directions_of(optimizer), directions_of(expected)) < 1e-12
        lookahead.retract()
        assert relative_error(params, twin) < 1e-14


def test_looking_into_a_window_leaves_training_bitwise_the_same() -> None:
    trained = []
    for is_watched in (False, True):
        params = start()
        optimizer = sgd(params)
        lookahead = train(optimizer, JoinedDirections(optimizer, 0.9), 3)
        x = [p.detach().clone() for p in params]
        m = [tensor.clone() for tensor in directions_of(optimizer)]
        for step_idx in range(3):
            lookahead.extrapolate()
            if is_watched:
                with lookahead.at_iterate():
                    if step_idx == 0:
                        # One unit in the last place of y, where |y| < 4.
                        torch.testing.assert_close([*params], x, rtol=0, atol=2.4e-7)
                        assert relative_error(directions_of(optimizer), m) < 1e-5
            for p, gradient in zip(params, gradients([p.detach() for p in params], 0), strict=True):
                p.grad = gradient
            optimizer.step()
        trained.append([*params, *directions_of(optimizer)])
    assert equal(*trained)


def test_state_that_was_loaded_or_cleared_is_not_finished() -> None:
    params = start()
    optimizer = sgd(params)
    directions = JoinedDirections(optimizer, 0.9, ends_late=True)
    lookahead = train(optimizer, directions, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    lookahead.extrapolate()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()  # its end waits
    optimizer.load_state_dict(saved)
    expected = [entry[DIRECTION_KEY] for entry in saved["state"].values()]
    assert equal(directions_of(optimizer), expected)
    lookahead.extrapolate()
    optimizer.step()
    optimizer.state.clear()
    lookahead.extrapolate()
    assert not optimizer.state


class Watches(Callback):
    """A callback of the user that looks at nothing."""


class Hooks(Toy):
    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        return None


@pytest.mark.parametrize(
    ("module", "callbacks", "expected"),
    [
        (Toy(adamw), [], True),
        (Toy(adamw), [Watches], False),
        (Toy(adamw), [LambdaCallback], False),
        (Toy(adamw), [partial(EMAWeightAveraging, decay=0.9)], False),
        (Hooks(adamw), [], False),
        (Manual(), [], False),
    ],
)
def test_trainer_ends_late_where_nobody_can_look(
    module: LightningModule, callbacks: list[Callable[[], Callback]], expected: bool
) -> None:
    found = []

    def note(self: JoinedDirections, *args: Any, **kwargs: Any) -> None:
        found.append(self.ends_late)
        original(self, *args, **kwargs)

    original = JoinedDirections.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JoinedDirections, "finish", note)
        others = [make() for make in callbacks]
        make_trainer([ema_nesterov(compile=True), *others], max_steps=2).fit(module, loader(2))
    assert found == [expected] * 2


def test_trainer_with_compile_saves_and_ends_with_the_same_numbers(tmp_path: Any) -> None:
    results = []
    for compile in (False, True):
        module = Toy(adamw)
        checkpoint = ModelCheckpoint(
            tmp_path / str(compile), every_n_train_steps=2, save_top_k=-1, filename="{step}"
        )
        trainer = make_trainer(
            [ema_nesterov(compile=compile), checkpoint],
            max_epochs=2,
            accumulate_grad_batches=2,
            val_check_interval=3,
            enable_checkpointing=True,
        )
        trainer.fit(module, loader(6), loader(2))
        path = tmp_path / str(compile) / "step=4.ckpt"
        saved = torch.load(path, weights_only=False)
        states = saved["optimizer_states"][0]["state"].values()
        tensors = [*saved["state_dict"].values(), *(s[DIRECTION_KEY] for s in states)]
        raw = [state[DIRECTION_KEY] for state in trainer.optimizers[0].state.values()]
        results.append([*tensors, *snapshot(module), *raw])
    # The two forms round differently; a fold in place of a direction would be off by its size.
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)


def test_attach_takes_both() -> None:
    model = nn.Linear(3, 2)
    optimizer = sgd(model.parameters())
    handle = attach_ema_nesterov(
        optimizer, model, ema_decay=0.9, warmup=0, rest=0, compile=True, ends_late=True
    )
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
    raw = optimizer.state[model.weight][DIRECTION_KEY].clone()
    with handle.at_iterate():
        assert not torch.equal(optimizer.state[model.weight][DIRECTION_KEY], raw)
    handle.detach()
