"""Training follows the paper's recursion, with every form of the arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.core import reference
from tests.core.problem import Attach, closure_of, direction, gradients, loss_of, start, train
from tests.toys import MakeOptimizer, adamw, equal, momentum, relative_error, sgd
from tests.versions import muon


@pytest.mark.parametrize("make_optimizer", [sgd, momentum, adamw, muon])
def test_two_hundred_steps_match_the_reference(
    attach: Attach, make_optimizer: MakeOptimizer
) -> None:
    # Muon orthogonalises in bfloat16, so its oracle runs in float32.
    dtype = torch.float32 if make_optimizer is muon else torch.float64
    params = start(dtype)
    trajectory, expected_m = reference.train(
        params,
        gradients,
        make_optimizer,
        num_steps=200,
        ema_decay=0.9,
        step_size=lambda t: 0.5 if 20 <= t < 170 else 0.0,
        dtype=dtype,
    )
    optimizer = make_optimizer(params)
    lookahead = attach(optimizer, warmup=20, rest=30, total_steps=200)
    for step_idx in range(200):
        lookahead.extrapolate()
        for p, gradient in zip(
            params, gradients([p.detach() for p in params], step_idx), strict=True
        ):
            p.grad = gradient
        optimizer.step()
    # float64 rounding over 200 steps; Muon works in bfloat16, where one unit is 0.4 %.
    tolerance = 1e-4 if make_optimizer is muon else 1e-12
    assert relative_error(params, trajectory[-1]) < tolerance
    # Also in the last part, without lookahead, the direction follows the displacements.
    m = [direction(lookahead, p) for p in params]
    assert relative_error(m, expected_m) < 100 * tolerance
    untreated, _ = reference.train(
        start(dtype),
        gradients,
        make_optimizer,
        num_steps=200,
        ema_decay=0.9,
        step_size=lambda _: 0.0,
        dtype=dtype,
    )
    assert relative_error(untreated[100], trajectory[100]) > 1e-3


@pytest.mark.parametrize(("ema_decay", "step_size"), [(0.9, -0.5), (0.3, -0.43), (0.0, 0.5)])
def test_other_decays_and_step_sizes_match_the_reference_after_an_exception(
    attach: Attach, ema_decay: float, step_size: float
) -> None:
    """A negative step size too; with 0.3 and -0.43 a fold holds nothing of the direction."""
    params = start(torch.float64)
    trajectory, expected_m = reference.train(
        params,
        gradients,
        sgd,
        num_steps=20,
        ema_decay=ema_decay,
        step_size=lambda _: step_size,
    )
    optimizer = sgd(params)
    lookahead = attach(optimizer, lookahead_step_size=step_size, ema_decay=ema_decay)
    train(lookahead, params, 10)
    lookahead.extrapolate()
    torch.autograd.backward(loss_of(params))
    lookahead._begin_step()
    lookahead.retract()  # the step raised before it changed a parameter
    lookahead.extrapolate()
    with lookahead.at_iterate():
        assert relative_error(params, trajectory[10]) < 1e-12
    train(lookahead, params, 10)
    assert relative_error(params, trajectory[-1]) < 1e-12
    assert relative_error([direction(lookahead, p) for p in params], expected_m) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kwargs", [{"lookahead_step_size": 0.0}, {"warmup": 20}])
def test_zero_step_size_matches_base_optimizer_bitwise(
    attach: Attach, dtype: torch.dtype, kwargs: dict[str, Any]
) -> None:
    params, plain = start(dtype), start(dtype)
    train(attach(adamw(params), **kwargs), params, 20)
    optimizer = adamw(plain)
    for _ in range(20):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(plain))
        optimizer.step()
    assert equal(params, plain)
    treated = start(dtype)
    train(attach(adamw(treated)), treated, 20)
    assert not equal(treated, plain)


def test_parameters_without_gradient_take_no_step(attach: Attach) -> None:
    params = start(torch.float64)
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = adamw([*params, unused])

    def sometimes(ps: list[Tensor], step_idx: int) -> list[Tensor | None]:
        full = gradients(ps[:2], step_idx)
        return [full[0], full[1] if step_idx % 3 else None, None]

    lookahead = attach(optimizer)
    trajectory, expected_m = reference.train(
        [*params, unused],
        sometimes,
        adamw,
        num_steps=30,
        ema_decay=0.9,
        step_size=lambda _: 0.5,
    )
    for step_idx in range(30):
        lookahead.extrapolate()
        held = [*params, unused]
        for p, g in zip(held, sometimes([p.detach() for p in held], step_idx), strict=True):
            p.grad = g
        optimizer.step()
    assert relative_error([*params, unused], trajectory[-1]) < 1e-12
    assert relative_error([direction(lookahead, p) for p in params], expected_m[:2]) < 1e-10
    assert unused not in optimizer.state
    assert torch.equal(unused, torch.ones(3, dtype=torch.float64))


def test_each_group_follows_its_own_learning_rate(attach: Attach) -> None:
    params = start(torch.float64)
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.02, "max_lr": 0.04}]
    optimizer = torch.optim.SGD(groups)
    lookahead = attach(optimizer)
    train(lookahead, params, 3)
    x = [p.detach().clone() for p in params]
    lookahead.extrapolate()
    for p, x_i, step_size in zip(params, x, (0.5, 0.25), strict=True):
        torch.testing.assert_close(p.detach(), x_i + step_size * direction(lookahead, p))


def test_step_size_is_frozen_from_extrapolation_to_fold(attach: Attach) -> None:
    params = start(torch.float64)
    optimizer = sgd(params)
    lookahead = attach(optimizer)
    train(lookahead, params, 2)
    x = [p.detach().clone() for p in params]
    m = [direction(lookahead, p).clone() for p in params]
    lookahead.extrapolate()
    optimizer.param_groups[0]["lr"] *= 0.1  # as LitGPT does between micro-batches
    lookahead.extrapolate()
    optimizer.step()
    for p, x_i, m_i in zip(params, x, m, strict=True):
        expected = 0.9 * m_i + 0.1 * (p.detach() - x_i)
        torch.testing.assert_close(direction(lookahead, p), expected)


class PlainSubclass(torch.optim.SGD):
    """Calls ``super().step()``, so the hooks fire twice, and then changes parameters once more."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.99)
        return loss


@pytest.mark.parametrize("with_closure", [False, True])
def test_hooks_that_fire_twice_count_once(attach: Attach, with_closure: bool) -> None:
    params = start(torch.float64)

    def make(ps: Iterable[Tensor]) -> Optimizer:
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # patches the parent's step
        return PlainSubclass(ps, lr=0.05)

    trajectory, expected_m = reference.train(
        params, gradients, make, num_steps=10, ema_decay=0.9, step_size=lambda _: 0.5
    )
    optimizer = make(params)
    lookahead = attach(optimizer)
    closure = closure_of(lookahead, params)
    for _ in range(10):
        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    assert relative_error(params, trajectory[-1]) < 1e-12
    assert relative_error([direction(lookahead, p) for p in params], expected_m) < 1e-11
    assert lookahead.step_idx == 10


@pytest.mark.parametrize("keyword", [False, True])
def test_lbfgs_calls_its_closure_many_times(attach: Attach, keyword: bool) -> None:
    params = start(torch.float64)
    optimizer: Any = torch.optim.LBFGS(params, lr=0.1, max_iter=4)
    lookahead = attach(optimizer)
    points: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        lookahead.extrapolate()
        points.append(params[0].detach().clone())
        loss = loss_of(params)
        torch.autograd.backward(loss)
        return loss

    for _ in range(5):
        x = [p.detach().clone() for p in params]
        m = [torch.zeros_like(p) if p not in optimizer.state else direction(lookahead, p).clone()
             for p in params]  # fmt: skip
        points.clear()
        if keyword:
            optimizer.step(closure=closure)
        else:
            optimizer.step(closure)
        assert len(points) > 1
        # The first evaluation is at y; the later ones where LBFGS went, without a second lookahead.
        torch.testing.assert_close(points[0], x[0] + 0.5 * m[0])
        for p, x_i, m_i in zip(params, x, m, strict=True):
            expected = 0.9 * m_i + 0.1 * (p.detach() - x_i)
            torch.testing.assert_close(direction(lookahead, p), expected)


@pytest.mark.slow
@pytest.mark.parametrize("ema_decay", [0.9, 0.99])
@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_bfloat16_parameters_are_followed_as_well_as_with_two_bfloat16_buffers(
    attach: Attach, make_optimizer: MakeOptimizer, ema_decay: float
) -> None:
    """Updates near one unit in the last place of the parameters, against the float64 recursion.

    Rounding of the parameters is most of both errors. That the direction is that of the stored
    iterates is in test_narrow.py.
    """
    generator = torch.Generator().manual_seed(0)

    def random() -> Tensor:
        return torch.randn(5000, generator=generator, dtype=torch.float64)

    x_0 = (0.2 * random()).bfloat16()
    drift = random()
    noisy = [0.02 * (drift + random()) for _ in range(300)]

    def make(params: Iterable[Tensor]) -> Optimizer:
        optimizer = make_optimizer(params)
        optimizer.param_groups[0]["lr"] *= 0.1
        return optimizer

    results = [
        reference.train(
            [x_0],
            lambda _, step_idx: [noisy[step_idx]],
            make,
            num_steps=300,
            ema_decay=ema_decay,
            step_size=lambda _: 0.5,
            dtype=dtype,
        )
        for dtype in (torch.float64, torch.bfloat16)
    ]
    (exact, exact_m), (two_buffers, two_buffers_m) = results
    p = nn.Parameter(x_0.clone())
    lookahead = attach(make([p]), ema_decay=ema_decay)
    for gradient in noisy:
        lookahead.extrapolate()
        p.grad = gradient.bfloat16()
        lookahead.base_optimizer.step()
    ours = relative_error([direction(lookahead, p)], exact_m)
    theirs = relative_error(two_buffers_m, exact_m)
    assert ours < 1.05 * theirs  # at most 1.02 was measured: which of the two rounds more is chance
    moved = exact[-1][0] - x_0.double()
    errors = [(x.double() - exact[-1][0]).norm() for x in (p.detach(), two_buffers[-1][0])]
    assert errors[0] < 1.05 * errors[1] < 2 * moved.norm()
