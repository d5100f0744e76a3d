"""Training follows the paper's recursion, in every precision that a GPU is used with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ema_nesterov import attach_ema_nesterov
from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.experiments.benchmark.measure import FORMS
from lightning_ema_nesterov.rules.make import Settings
from tests.core import reference
from tests.core.problem import gradients, start
from tests.distributed.observers import RecordsSteps, check_step, counted_kernel_calls
from tests.distributed.trainer_run import small_kernels
from tests.toys import (
    Batches,
    MakeOptimizer,
    Toy,
    adamw,
    batch_gradients,
    ema_nesterov,
    loader,
    make_trainer,
    momentum,
    relative_error,
    sgd,
    snapshot,
    trajectory_of,
)


def fused(params: Iterable[Tensor]) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, fused=True)


def capturable(params: Iterable[Tensor]) -> Optimizer:
    """With a learning rate on the GPU, where the parameters are there."""
    params = list(params)
    is_cuda = params[0].is_cuda
    lr = torch.tensor(1e-2, device=params[0].device)
    return torch.optim.AdamW(params, lr=lr, capturable=is_cuda, foreach=is_cuda)


# float32 rounding over 60 steps; then that of the format of the directions.
BOUNDS = {"default": 1e-5, "compile": 1e-5, "one_pass": 1e-5, "bfloat16": 0.03, "int8": 0.12}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_matches_the_reference(form: str, device: torch.device) -> None:
    def small_steps(params: Iterable[Tensor]) -> Optimizer:
        return torch.optim.SGD(params, lr=5e-3)

    trajectory, expected_m = reference.train(
        start(), gradients, small_steps, num_steps=60, ema_decay=0.9, step_size=lambda _: 0.5
    )
    settings = dict(FORMS[form])
    ends_late = settings.pop("ends_late", False)
    params = start(device=device)
    optimizer = small_steps(params)
    rule = Settings(0.5, 0.9, **settings).rule(optimizer, ends_late=ends_late)
    lookahead = Lookahead(rule, LookaheadSchedule(0.5)).attach()
    calls: list[int] = []
    with small_kernels(), counted_kernel_calls(calls):
        for step_idx in range(60):
            lookahead.extrapolate()
            found = gradients([p.detach() for p in params], step_idx)
            for p, gradient in zip(params, found, strict=True):
                p.grad = gradient
            optimizer.step()
        rule.make_state_readable()
        directions = [rule.read_direction(p) for p in params]
    moved = [a - b for a, b in zip(trajectory[-1], trajectory[0], strict=True)]
    ours = [a.cpu().double() - b for a, b in zip(params, trajectory[0], strict=True)]
    assert relative_error(ours, moved) < BOUNDS[form]
    assert relative_error(directions, expected_m) < 10 * BOUNDS[form]
    assert bool(calls) == settings.get("compile", False)
    assert {m.device.type for m in directions} == {device.type}
    plain, _ = reference.train(
        start(), gradients, small_steps, num_steps=60, ema_decay=0.9, step_size=lambda _: 0.0
    )
    alone = [a - b for a, b in zip(plain[-1], plain[0], strict=True)]
    assert relative_error(alone, moved) > 2 * BOUNDS[form]


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("make_optimizer", [sgd, momentum, adamw, fused, capturable])
def test_trainer_matches_the_reference(
    make_optimizer: MakeOptimizer, accumulate: int, device: torch.device
) -> None:
    expected = trajectory_of(
        Toy(adamw if make_optimizer in (fused, capturable) else make_optimizer),
        num_steps=6,
        accumulate=accumulate,
    )[-1]
    found = []
    for callbacks in ([ema_nesterov()], []):
        module = Toy(make_optimizer)
        trainer = make_trainer(
            callbacks,
            max_steps=6,
            accumulate_grad_batches=accumulate,
            accelerator=device.type,
        )
        trainer.fit(module, loader(6 * accumulate))
        found.append(relative_error(snapshot(module), expected))
    assert found[0] < 1e-5  # float32 rounding over six steps
    assert found[1] > 1e-3


class Overflows(Toy):
    """The loss of one batch is infinite, where it is told to be."""

    overflows = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch)
        return loss * float("inf") if self.overflows and batch_idx == 3 else loss


# What rounds a parameter near 1: float32, or half a unit of bfloat16 in the first interval above.
ROUNDING = {"32-true": 2e-7, "bf16-mixed": 2e-7, "16-mixed": 2e-7, "bf16-true": 2**-8}


@pytest.mark.parametrize("make_optimizer", [adamw, fused])
@pytest.mark.parametrize("precision", ROUNDING)
def test_every_step_follows_the_equations_also_one_that_the_scaler_skips(
    precision: str, make_optimizer: MakeOptimizer, device: torch.device
) -> None:
    module, recorder = Overflows(make_optimizer), RecordsSteps()
    module.overflows = precision == "16-mixed"
    options: dict[str, Any] = {"precision": precision}
    if module.overflows:  # Lightning takes bf16-mixed for it on a CPU
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0)
        options = {"plugins": [MixedPrecision("16-mixed", device.type, scaler)]}
    trainer = make_trainer(
        [ema_nesterov(), recorder], max_steps=8, accelerator=device.type, **options
    )
    trainer.fit(module, loader(8))
    assert len(recorder.before) == len(recorder.after) == 8
    assert recorder.after[-1][1].dtype == torch.float32
    for idx in range(1, 8):
        check_step(
            recorder.before[idx],
            recorder.after[idx - 1],
            recorder.after[idx],
            is_skipped=module.overflows and idx == 3,
            atol=ROUNDING[precision],
        )


def eager(module: nn.Module, device: torch.device) -> nn.Module:
    return module


def compiled(module: nn.Module, device: torch.device, **options: Any) -> nn.Module:
    """With the compiler on a GPU; on a CPU it takes a minute, and the graph alone is tried."""
    kwargs = options if device.type == "cuda" else {"backend": "eager"}
    made: Any = torch.compile(module, **kwargs)
    assert isinstance(made, nn.Module)
    return made


MODULES: dict[str, Callable[[nn.Module, torch.device], nn.Module]] = {
    "eager": eager,
    "torch.compile": compiled,
    "reduce-overhead": partial(compiled, mode="reduce-overhead"),  # with CUDA graphs
}


@pytest.mark.parametrize("kind", MODULES)
def test_attached_loop_matches_the_reference(kind: str, device: torch.device) -> None:
    """Also where the forward and backward passes are CUDA graphs; with a look at each iterate."""
    toy = Toy(adamw)
    batches = Batches(12).data
    expected, _ = reference.train(
        snapshot(toy),
        batch_gradients(toy, Batches(12, torch.float64).data),
        adamw,
        num_steps=12,
        ema_decay=0.9,
        step_size=lambda _: 0.5,
    )
    toy = Toy(adamw).to(device)
    called = MODULES[kind](toy, device)
    optimizer = adamw(toy.parameters())
    handle = attach_ema_nesterov(optimizer, called, ema_decay=0.9, warmup=0, rest=0)
    for batch in batches.to(device):
        optimizer.zero_grad()
        called(batch).backward()
        with torch.no_grad():
            called(batch)
        optimizer.step()
    assert relative_error(snapshot(toy), expected[-1]) < 1e-5  # float32 rounding over 12 steps
    with handle.at_average():
        average = [x.double() for x in expected[0]]
        for iterates in expected[1:]:
            average = [0.9 * a + 0.1 * x for a, x in zip(average, iterates, strict=True)]
        assert relative_error(snapshot(toy), average) < 1e-5
        assert relative_error(snapshot(toy), expected[-1]) > 1e-3
