"""Directions in bfloat16 and int8: how exact, how large, and that everything else still holds."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.rules import ema_compressed as compressed
from lightning_ema_nesterov.rules.codecs import BFloat16, Codec, Int8, codec_for
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY, SCALES_KEY
from lightning_ema_nesterov.rules.ema_compressed import CompressedDirections
from lightning_ema_nesterov.rules.make import Settings
from tests.core import reference
from tests.toys import HalfStep, adamw, equal, relative_error, sgd

COMPRESSED = ("bfloat16", "int8")
# A vector and a small matrix keep float32 in int8; 200 and 300 are no multiples of a block.
SHAPES = [(40, 128), (33,), (64, 200), (3, 20, 300), (4, 4)]


def start(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [nn.Parameter(value.to(dtype)) for value in values]


def gradients(params: list[Tensor], step_idx: int) -> list[Tensor]:
    """As much drift as noise."""
    generator = torch.Generator().manual_seed(7)
    drift = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
    generator.manual_seed(step_idx + 100)
    noise = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
    return [(d + n).to(p.dtype) for p, d, n in zip(params, drift, noise, strict=True)]


def attach(optimizer: Optimizer, dtype: str, ema_decay: float = 0.9, **kwargs: Any) -> Lookahead:
    rule = Settings(ema_decay=ema_decay, direction_dtype=dtype).rule(optimizer)
    options = {"lookahead_step_size": 0.5, **kwargs}
    return Lookahead(rule, LookaheadSchedule(**options)).attach()


def train(lookahead: Lookahead, num_steps: int, first: int = 0) -> None:
    params = lookahead.base_optimizer.param_groups[0]["params"]
    for step_idx in range(first, first + num_steps):
        lookahead.extrapolate()
        for p, g in zip(params, gradients([p.detach() for p in params], step_idx), strict=True):
            p.grad = g
        lookahead.base_optimizer.step()


def stored(lookahead: Lookahead) -> list[Tensor]:
    params = lookahead.base_optimizer.param_groups[0]["params"]
    return [tensor.clone() for tensor in lookahead.rule.store.tensors(params)]


def read(lookahead: Lookahead) -> list[Tensor]:
    params = lookahead.base_optimizer.param_groups[0]["params"]
    assert isinstance(lookahead.rule, CompressedDirections)
    return [lookahead.rule.read_direction(p).clone() for p in params]


@pytest.mark.parametrize("codec", [BFloat16(), Int8()])
def test_rounding_is_right_on_average_and_never_off_by_a_unit(codec: Codec) -> None:
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(8, 256, generator=generator)
    units = m.abs().view(8, 2, 128).amax(2, keepdim=True).expand(8, 2, 128).reshape(8, 256) / 127
    if isinstance(codec, BFloat16):
        units = m.abs() * 2**-7  # 8 bits, the first of which is implied
    tensors = codec.make(m)
    total = torch.zeros(8, 256)
    for _ in range(400):
        codec.write_(tensors, m, torch.rand(8, 256, generator=generator))
        assert ((codec.read(tensors) - m).abs() <= 1.0001 * units).all()
        total += codec.read(tensors) / 400
    # The mean of 400 numbers with a spread of at most half a unit, at five standard deviations.
    assert ((total - m).abs() <= 5 * 0.5 / 20 * units).all()
    codec.write_(tensors, m, noise=None)
    assert ((codec.read(tensors) - m).abs() <= 0.5001 * units).all()
    nearest = (codec.read(tensors) - m).abs()
    assert (nearest > 5 * 0.5 / 20 * units).any()  # which no mean of it would reach


@pytest.mark.parametrize("codec", [BFloat16(), Int8()])
def test_steady_displacements_are_reached_only_with_stochastic_rounding(codec: Codec) -> None:
    generator = torch.Generator().manual_seed(0)
    before, steady = (torch.randn(8, 128, generator=generator) for _ in range(2))
    errors = {}
    for is_stochastic in (True, False):
        tensors = codec.make(steady)
        codec.write_(tensors, before, noise=None)
        for _ in range(4000):  # 0.999 ** 4000 = 2 % of the start is left
            noise = torch.rand(8, 128, generator=generator) if is_stochastic else None
            codec.write_(tensors, codec.read(tensors) * 0.999 + steady * 0.001, noise)
        errors[is_stochastic] = relative_error([codec.read(tensors)], [steady])
    assert errors[True] < 0.15
    assert errors[False] > 0.5


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.03), ("int8", 0.12)])
def test_direction_follows_the_reference(dtype: str, bound: float) -> None:
    def make(params: list[Tensor]) -> Optimizer:
        return torch.optim.SGD(params, lr=1e-3)

    exact, exact_m = reference.train(
        start(), gradients, make, num_steps=300, ema_decay=0.99, step_size=lambda _: 0.5
    )
    params = start()
    lookahead = attach(make([*params]), dtype, ema_decay=0.99)
    train(lookahead, 300)
    assert 0.001 < relative_error(read(lookahead), exact_m) < bound
    moved = [a - b.double() for a, b in zip(exact[-1], start(), strict=True)]
    ours = [a.double() - b.double() for a, b in zip(params, start(), strict=True)]
    assert relative_error(ours, moved) < bound


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", 1.0), ("bfloat16", 0.5), ("int8", 0.28)]
)
def test_state_of_a_transformer_is_as_small_as_it_says(dtype: str, expected: float) -> None:
    layer = nn.TransformerEncoderLayer(192, 4, 768)
    model = nn.Sequential(nn.Embedding(500, 192), layer, nn.Linear(192, 500, bias=False))
    optimizer = sgd(model.parameters())
    lookahead = attach(optimizer, dtype)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    tensors = lookahead.rule.store.tensors([*model.parameters()])
    num_bytes = sum(t.numel() * t.element_size() for t in tensors)
    share = num_bytes / sum(4 * p.numel() for p in model.parameters())
    assert share == expected or (dtype == "int8" and 0.25 < share <= expected)


def test_what_is_stored_follows_the_shape() -> None:
    params = start()
    lookahead = attach(sgd(params), "int8")
    train(lookahead, 1)
    states = [lookahead.base_optimizer.state[p] for p in params]
    assert [s[DIRECTION_KEY].dtype for s in states] == [
        torch.int8, torch.float32, torch.int8, torch.int8, torch.float32
    ]  # fmt: skip
    assert [s[SCALES_KEY].shape for s in states if SCALES_KEY in s] == [
        (40, 1),
        (64, 2),
        (3, 20, 3),
    ]
    assert [s[DIRECTION_KEY].shape for s in states] == [p.shape for p in params]
    for dtype in COMPRESSED:  # complex numbers stay as they are
        codec = codec_for(torch.zeros(80, 80, dtype=torch.complex64), dtype)
        assert codec.dtypes == (torch.complex64,)


@pytest.mark.parametrize("dtype", COMPRESSED)
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_step_size_matches_base_optimizer_bitwise(
    dtype: str, param_dtype: torch.dtype
) -> None:
    params, plain, treated = (start(param_dtype) for _ in range(3))
    train(attach(adamw(params), dtype, warmup=10), 10)
    optimizer = adamw(plain)
    for step_idx in range(10):
        for p, g in zip(plain, gradients([p.detach() for p in plain], step_idx), strict=True):
            p.grad = g
        optimizer.step()
    assert equal(params, plain)
    train(attach(adamw(treated), dtype), 10)
    assert not equal(treated, plain)


@pytest.mark.parametrize("dtype", COMPRESSED)
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_state_continues_bitwise(dtype: str, param_dtype: torch.dtype) -> None:
    params = start(param_dtype)
    lookahead = attach(adamw(params), dtype)
    train(lookahead, 5)
    file = io.BytesIO()
    torch.save([params, lookahead.base_optimizer.state_dict()], file)
    file.seek(0)
    loaded, state = torch.load(file, weights_only=True)
    again = attach(adamw([nn.Parameter(p.detach()) for p in loaded]), dtype)
    again.base_optimizer.load_state_dict(state)
    before = stored(lookahead)
    assert equal(stored(again), before)
    assert [t.dtype for t in stored(again)] == [t.dtype for t in before]
    train(lookahead, 5, first=5)
    train(again, 5, first=5)
    assert equal(again.base_optimizer.param_groups[0]["params"], params)
    assert equal(stored(again), stored(lookahead))
    assert not equal(before, stored(lookahead))


@pytest.mark.parametrize("first", ["float32", *COMPRESSED])
@pytest.mark.parametrize("second", ["float32", *COMPRESSED])
def test_checkpoint_continues_in_another_format(first: str, second: str) -> None:
    params = start()
    lookahead = attach(sgd(params), first)
    train(lookahead, 5)
    again = attach(sgd(params), second)
    again.base_optimizer.load_state_dict(lookahead.base_optimizer.state_dict())
    fresh = attach(sgd(start()), second)
    train(fresh, 1)
    assert [t.dtype for t in stored(again)] == [t.dtype for t in stored(fresh)]
    plain = attach(sgd(params), "float32")
    plain.base_optimizer.load_state_dict(again.base_optimizer.state_dict())
    exact = attach(sgd(params), "float32")
    exact.base_optimizer.load_state_dict(lookahead.base_optimizer.state_dict())
    # To nearest once: 0.2 % of each element in bfloat16, 0.4 % of the largest in a block in int8.
    error = relative_error(stored(plain), stored(exact))
    assert error < 0.012
    assert (error > 0) == (second not in ("float32", first))
    train(again, 2)


@pytest.mark.parametrize("dtype", COMPRESSED)
def test_parameters_without_gradient_and_skipped_steps_change_nothing(dtype: str) -> None:
    params = start()
    optimizer = torch.optim.AdamW(params, lr=1e-2, fused=True)
    lookahead = attach(optimizer, dtype)
    train(lookahead, 3)
    x, before = [p.detach().clone() for p in params], stored(lookahead)
    lookahead.extrapolate()
    assert not equal(params, x)
    for p in params:
        p.grad = None
    optimizer.step()
    # One unit in the last place of y, where |y| < 8.
    torch.testing.assert_close([*params], x, rtol=0, atol=4.8e-7)
    assert equal(stored(lookahead), before)
    lookahead.extrapolate()
    lookahead.skip()
    assert equal(stored(lookahead), before)


@pytest.mark.parametrize("dtype", COMPRESSED)
@pytest.mark.parametrize("num_steps", [0, 3])
def test_looking_into_a_step_leaves_it_bitwise_the_same(dtype: str, num_steps: int) -> None:
    """A signal handler that saves a checkpoint in the middle of a step."""
    results = []
    for is_watched in (False, True):
        params = start()
        optimizer = HalfStep(params, lr=0.05)
        lookahead = attach(optimizer, dtype)
        train(lookahead, num_steps)
        x, m = [p.detach().clone() for p in params], stored(lookahead)
        optimizer.fails = True
        with pytest.raises(MemoryError):
            train(lookahead, 1, first=num_steps)
        if is_watched:
            with lookahead.at_iterate():
                torch.testing.assert_close([*params[1:]], x[1:], rtol=0, atol=4.8e-7)
                assert not torch.equal(params[0], x[0])
                assert not m or not equal(stored(lookahead), m)
            assert lookahead.is_open
        lookahead._end_step()
        results.append([*params, *stored(lookahead)])
    assert equal(*results)


@pytest.mark.parametrize("dtype", COMPRESSED)
def test_metrics_are_those_of_what_is_stored(dtype: str) -> None:
    params = start()
    lookahead = attach(sgd(params), dtype)
    train(lookahead, 3)
    x, m = (torch.cat([t.detach().flatten() for t in ts]) for ts in (params, read(lookahead)))
    lookahead.will_measure = True
    train(lookahead, 1, first=3)
    moved = torch.cat([p.detach().flatten() for p in params]) - x
    m_next = torch.cat([t.flatten() for t in read(lookahead)])
    metrics = lookahead.metrics
    assert metrics is not None
    # Sums in another order, and differences of float32 weights.
    assert metrics.direction_norm == pytest.approx(m_next.norm().item(), rel=1e-5)
    assert metrics.displacement_norm == pytest.approx(moved.norm().item(), rel=1e-5)
    cosine = torch.cosine_similarity(m, moved, dim=0).item()
    assert metrics.alignment == pytest.approx(cosine, rel=1e-4)


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Notes the sizes of new tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        is_in_place = func.overloadpacket.__name__.endswith("_")
        if isinstance(made, Tensor) and not func.is_view and not is_in_place:
            self.sizes.append(made.numel() * made.element_size())
        return made


@pytest.mark.parametrize("dtype", COMPRESSED)
def test_no_float32_direction_exists_as_a_whole(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(compressed._BLOCK_ELEMENTS, "cpu", 2**10)
    p = nn.Parameter(torch.randn(256, 256))
    optimizer = sgd([p])
    lookahead = attach(optimizer, dtype)
    p.grad = torch.ones_like(p)
    optimizer.step()
    with Allocations() as allocations:
        lookahead.extrapolate()
    assert max(allocations.sizes, default=0) <= 4 * 2**10
    lookahead._begin_step()
    with Allocations() as allocations:
        lookahead._end_step()
    assert 4 * 2**10 <= max(allocations.sizes) <= 8 * 2**10  # the noise of two blocks


def test_layouts_that_cannot_be_cut_work_as_a_whole() -> None:
    turned = [nn.Parameter(p.detach().t()) for p in start()[:1]]
    whole = [nn.Parameter(p.detach().t().contiguous()) for p in start()[:1]]
    for dtype in COMPRESSED:
        results = []
        for params in (turned, whole):
            lookahead = attach(sgd(params), dtype)
            train(lookahead, 3)
            results.append(read(lookahead))
        # Rounded with other noise.
        assert relative_error(*results) < 0.05
        assert results[0][0].shape == (128, 40)


def test_fsdp1_is_refused() -> None:
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapped)
    for dtype in COMPRESSED:
        with pytest.raises(ValueError, match=r"must be 'float32' under FSDP \(1\), got "):
            Settings(direction_dtype=dtype).rule(sgd(start()), wrapped)
    Settings().rule(sgd(start()), wrapped)


@pytest.mark.parametrize("codec", [BFloat16(), Int8()])
@pytest.mark.parametrize("shape", [(0, 4096), (0, 100)])
def test_an_empty_shard_has_an_empty_direction(codec: Codec, shape: tuple[int, int]) -> None:
    """A process may hold no row of a matrix that has fewer rows than there are processes."""
    tensors = codec.make(torch.empty(shape))
    codec.write_(tensors, torch.empty(shape), noise=None)
    direction = codec.read(tensors)
    assert (direction.shape, direction.dtype) == (shape, torch.float32)
