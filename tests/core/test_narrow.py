"""Parameters of few digits: their moves can be undone, and the direction keeps to the iterates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.narrow import extrapolate_reversibly_, retract_exactly_
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.rules.gpa import GPADirections
from lightning_ema_nesterov.rules.make import Settings
from tests.toys import HalfStep

DECAY = 0.99
NARROW = (torch.bfloat16, torch.float16)


def numbers(dtype: torch.dtype) -> Tensor:
    """Return numbers of all sizes, powers of 2 and zeros among them."""
    generator = torch.Generator().manual_seed(0)
    powers = 2.0 ** torch.arange(-8.0, 8.0)
    spread = torch.randn(2000, generator=generator) * 4.0 ** torch.randn(2000, generator=generator)
    return torch.cat([powers, -powers, torch.zeros(9), spread]).to(dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("step_size", [0.5, -0.3, 0.99])
def test_moves_can_be_undone(dtype: torch.dtype, scale: float, step_size: float) -> None:
    x = numbers(dtype)
    m = scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    m[::3] = (x[::3].float() * torch.finfo(dtype).eps).abs()  # moves of about half a unit
    y = x.clone()
    stays = extrapolate_reversibly_(y, m, step_size=step_size)
    assert stays.numel() == -(-x.numel() // 8)
    moved = y != x
    assert moved.float().mean() > 0.01
    # To one unit: the product is rounded before the sum on some CPUs.
    exact = (x.float() + step_size * m)[moved]
    torch.testing.assert_close(y[moved].float(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)
    untreated = (y.float() - step_size * m).to(dtype)
    retract_exactly_(y, m, stays, step_size=step_size)
    assert torch.equal(y, x)
    if scale < 1.0:  # as directions are: shorter than what they move
        assert not torch.equal(untreated, x)  # those that stayed


def test_numbers_without_end_stay() -> None:
    x = torch.tensor([65504.0, float("inf"), float("nan"), 1.0], dtype=torch.float16)
    y, m = x.clone(), torch.tensor([200.0, 1.0, 1.0, 1.0])
    extrapolate_reversibly_(y, m, step_size=0.5)
    assert y.nan_to_num(7.0, 8.0).tolist() == [65504.0, 8.0, 7.0, 1.5]


def train(
    dtype: torch.dtype, step_size: float, *, lr: float = 1e-3, **settings: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the read-out, the average of the iterates and the last one, in float64."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter((0.02 * torch.randn(32, 256, generator=generator)).to(dtype))
    target = 0.02 + 0.02 * torch.randn(p.shape, generator=generator)
    optimizer = torch.optim.AdamW([p], lr=lr, eps=1e-4, weight_decay=0.0)
    rule = Settings(step_size, DECAY, **settings).rule(optimizer)  # type: ignore[arg-type]  # named
    lookahead = Lookahead(rule, LookaheadSchedule(step_size)).attach()
    average = p.detach().double()
    for _ in range(200):
        lookahead.extrapolate()
        noise = 0.02 * torch.randn(p.shape, generator=generator)
        p.grad = (p.detach().float() - target + noise).to(dtype)
        optimizer.step()
        average = DECAY * average + (1.0 - DECAY) * p.detach().double()
    rule.make_state_readable()
    x = p.detach().double()
    return x - DECAY / (1.0 - DECAY) * rule.read_direction(p).double(), average, x


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("step_size", [0.0, 0.5, -0.3])
@pytest.mark.parametrize("lr", [1e-3, 1e-4])
def test_read_out_is_the_average_of_the_iterates(
    dtype: torch.dtype, step_size: float, lr: float
) -> None:
    """Also with 1e-4, where a move is half a unit of bfloat16: it was 2 times too far from x."""
    found, exact, x = train(dtype, step_size, lr=lr)
    assert (x - exact).norm() > 1e-2 * exact.norm()
    # Sums in float32, a hundred times as large as their error: 2e-7 to 5e-7 of the weights.
    assert (found - exact).norm() < 2e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_out_of_a_compiled_run(dtype: torch.dtype) -> None:
    found, exact, _ = train(dtype, 0.5, compile=True)
    assert (found - exact).norm() < 2e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stored", "bound"), [("bfloat16", 0.05), ("int8", 0.15)])
def test_read_out_of_a_compressed_direction(dtype: torch.dtype, stored: str, bound: float) -> None:
    """Its rounding is random: some percent of its length, with lookahead as without."""
    errors = []
    for step_size in (0.0, 0.5):
        found, exact, x = train(dtype, step_size, direction_dtype=stored)
        errors.append(float((found - exact).norm() / (x - exact).norm()))
    assert errors[0] < bound
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("decay", [0.05, 0.9])
def test_exception_in_a_step_leaves_iterate_and_direction(decay: float) -> None:
    params = [torch.nn.Parameter(numbers(torch.bfloat16)) for _ in range(2)]
    optimizer = HalfStep(params, lr=0.1)
    rule = Settings(0.5, decay).rule(optimizer)
    lookahead = Lookahead(rule, LookaheadSchedule(0.5)).attach()
    for step in range(4):
        x = params[1].detach().clone()
        m = rule.read_direction(params[1]).clone() if step else None
        optimizer.fails = step == 3
        lookahead.extrapolate()
        for p in params:
            p.grad = 0.01 * p.detach() + 0.001
        if step < 3:
            optimizer.step()
    assert m is not None
    assert not torch.equal(params[1], x)
    with pytest.raises(MemoryError):
        optimizer.step()
    lookahead.retract()
    assert torch.equal(params[1], x)
    torch.testing.assert_close(rule.read_direction(params[1]), m, rtol=1e-5, atol=1e-6)


def test_primal_averaging_begins_from_the_stored_iterate() -> None:
    p = torch.nn.Parameter(numbers(torch.bfloat16))
    optimizer = torch.optim.SGD([p], lr=0.1)
    rule = GPADirections(optimizer, 0.9)
    lookahead = Lookahead(rule, LookaheadSchedule(0.5)).attach()
    for step in range(3):
        x = p.detach().clone()
        lookahead.extrapolate()
        if step:
            fold = rule.begin([p], 0.5, is_measured=False)
            assert torch.equal(fold.buffers[0], x.float())
            assert not torch.equal(p, x)
        p.grad = 0.01 * p.detach() + 0.001
        optimizer.step()
