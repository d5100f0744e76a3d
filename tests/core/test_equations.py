"""The equations, by hand, against the oracle, and at their limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_ema_nesterov.core.equations import (
    begin_update_,
    cancel_update_,
    extrapolate_,
    finish_update_,
    fold_decay,
    retract_,
)
from tests.core import reference


def test_one_step_by_hand() -> None:
    # x = 2, m = 1, beta = 0.5: y = 2 + 0.5 * 1 = 2.5. The base optimizer moves y to 3.
    # gamma = 0.75: m' = 0.75 * 1 + 0.25 * (3 - 2) = 1.
    x, m = torch.tensor([2.0]), torch.tensor([1.0])
    extrapolate_([x], [m], step_size=0.5)
    assert x.item() == 2.5
    begin_update_([m], [x], ema_decay=0.75, step_size=0.5)
    assert m.item() == (0.75 + 0.25 * 0.5) * 1.0 - 0.25 * 2.5
    x.fill_(3.0)
    finish_update_([m], [x], ema_decay=0.75)
    assert m.item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_fold_does_not_depend_on_layout_or_dtype(dtype: torch.dtype) -> None:
    """A direction from a checkpoint may lie in memory otherwise than its parameter."""
    y = torch.randn(64, 3, dtype=dtype, generator=torch.Generator().manual_seed(0)).t()
    m = torch.randn(3, 64, dtype=dtype, generator=torch.Generator().manual_seed(1))
    expected = (0.9 + 0.1 * 0.5) * m - 0.1 * y
    for layout in (m.clone(), m.t().contiguous().t(), m.clone().expand(2, 3, 64)[0]):
        begin_update_([layout], [y], ema_decay=0.9, step_size=0.5)
        torch.testing.assert_close(layout, expected)


@pytest.mark.parametrize("ema_decay", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("step_size", [0.0, 0.3, 0.9])
def test_random_steps_match_the_reference(ema_decay: float, step_size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), ()]
    x_0 = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    noise = [
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        for _ in range(30)
    ]

    def gradients(params: list[Tensor], step_idx: int) -> list[Tensor]:
        return [0.1 * p + n for p, n in zip(params, noise[step_idx], strict=True)]

    trajectory, expected_m = reference.train(
        x_0,
        gradients,
        lambda params: torch.optim.SGD(params, lr=0.1),
        num_steps=30,
        ema_decay=ema_decay,
        step_size=lambda _: step_size,
    )
    x = [tensor.clone() for tensor in x_0]
    m = [torch.zeros_like(tensor) for tensor in x_0]
    for step_idx in range(30):
        extrapolate_(x, m, step_size=step_size)
        begin_update_(m, x, ema_decay=ema_decay, step_size=step_size)
        for p, gradient in zip(x, gradients(x, step_idx), strict=True):
            p.sub_(gradient, alpha=0.1)
        finish_update_(m, x, ema_decay=ema_decay)
    # Rounding of 30 steps in float64, with terms of size 1.
    torch.testing.assert_close(x, trajectory[-1], rtol=0, atol=1e-13)
    torch.testing.assert_close(m, expected_m, rtol=0, atol=1e-13)
    untreated, _ = reference.train(
        x_0,
        gradients,
        lambda params: torch.optim.SGD(params, lr=0.1),
        num_steps=30,
        ema_decay=ema_decay,
        step_size=lambda _: 0.0,
    )
    assert torch.equal(untreated[-1][0], trajectory[-1][0]) == (step_size == 0)


def test_direction_of_steady_displacements_is_their_size() -> None:
    x, m = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for _ in range(200):
        begin_update_([m], [x], ema_decay=0.9, step_size=0.0)
        x += 0.25
        finish_update_([m], [x], ema_decay=0.9)
    # 0.9 ** 200 = 7e-10 of the start is left.
    torch.testing.assert_close(m, torch.full_like(m, 0.25), rtol=1e-8, atol=0)


def test_steady_base_steps_gain_one_over_one_minus_step_size() -> None:
    x, m = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    before = x.clone()
    for _ in range(400):
        before = x.clone()
        extrapolate_([x], [m], step_size=0.75)
        begin_update_([m], [x], ema_decay=0.8, step_size=0.75)
        x += 1.0
        finish_update_([m], [x], ema_decay=0.8)
    # 1 / (1 - 0.75) = 4; the rest decays like (0.8 + 0.2 * 0.75) ** 400 = 1e-9.
    torch.testing.assert_close(x - before, torch.full_like(x, 4.0), rtol=1e-7, atol=0)


def test_retract_undoes_extrapolate() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1000, generator=generator) + 0.5
    m = torch.randn(1000, generator=generator) * 0.01
    y = x.clone()
    extrapolate_([y], [m], step_size=0.7)
    assert not torch.equal(y, x)
    retract_([y], [m], step_size=0.7)
    # One unit in the last place, where the sum crossed a power of two; nearly all are exact.
    torch.testing.assert_close(y, x, rtol=1.2e-7, atol=0)
    assert (y == x).float().mean() > 0.95


def test_cancel_undoes_begin() -> None:
    m, y = torch.tensor([0.5, -2.0]), torch.tensor([3.0, 4.0])
    begun = m.clone()
    begin_update_([begun], [y], ema_decay=0.5, step_size=0.5)
    assert not torch.equal(begun, m)
    cancel_update_([begun], [y], ema_decay=0.5, step_size=0.5)
    torch.testing.assert_close(begun, m)
    begin_update_([begun], [y], ema_decay=0.0, step_size=0.0)
    cancel_update_([begun], [y], ema_decay=0.0, step_size=0.0)
    assert torch.equal(begun, torch.zeros(2))


def test_bfloat16_parameters_keep_a_float32_direction() -> None:
    x = torch.tensor([1.0], dtype=torch.bfloat16)
    m = torch.tensor([0.1])
    begin_update_([m], [x], ema_decay=0.5, step_size=0.0)
    finish_update_([m], [x + 0.5], ema_decay=0.5)
    assert m.dtype == torch.float32
    torch.testing.assert_close(m, torch.tensor([0.3]))


def test_empty_lists_are_no_work() -> None:
    extrapolate_([], [], step_size=0.5)
    retract_([], [], step_size=0.5)
    begin_update_([], [], ema_decay=0.5, step_size=0.5)
    finish_update_([], [], ema_decay=0.5)
    cancel_update_([], [], ema_decay=0.5, step_size=0.5)
    assert fold_decay(0.5, 0.5) == 0.75


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 and 0"):
        extrapolate_([torch.zeros(1)], [], step_size=0.5)
