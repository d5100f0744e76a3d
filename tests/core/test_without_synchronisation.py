"""A step that is not logged never waits for a GPU; seen on tensors of a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_ema_nesterov import attach_ema_nesterov
from lightning_ema_nesterov.core import window
from lightning_ema_nesterov.core.equations import join_
from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.progress import Progress
from lightning_ema_nesterov.core.rule import Fold, LookaheadRule
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.rules import codecs, ema_joined
from lightning_ema_nesterov.rules.ema import EMADirections
from lightning_ema_nesterov.rules.ema_compressed import CompressedDirections
from lightning_ema_nesterov.rules.ema_joined import JoinedDirections
from lightning_ema_nesterov.rules.gpa import GPADirections
from lightning_ema_nesterov.rules.slow_weights import SlowWeights
from tests.core.fake_gpu import MixedDevicesError, SynchronisationError, fake_gpu

SHAPES = [(16, 128), (33,), (8, 200)]
RULES: dict[str, Callable[[Optimizer], LookaheadRule]] = {
    "float32": lambda optimizer: EMADirections(optimizer, 0.9),
    "compile": lambda optimizer: JoinedDirections(optimizer, 0.9),
    "compile, late": lambda optimizer: JoinedDirections(optimizer, 0.9, ends_late=True),
    "bfloat16": lambda optimizer: CompressedDirections(optimizer, 0.9, "bfloat16"),
    "int8": lambda optimizer: CompressedDirections(optimizer, 0.9, "int8"),
    "GPA": lambda optimizer: GPADirections(optimizer, 0.7),
    "SNOO": lambda optimizer: SlowWeights(optimizer, 2, 0.8, 0.5),
}


class Net(nn.Module):
    """Weights, without an initialisation that reads them."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        shapes = [torch.ones(shape, device=device, dtype=dtype) for shape in SHAPES]
        self.weights = nn.ParameterList([nn.Parameter(values) for values in shapes])

    @override
    def forward(self) -> Tensor:
        return torch.zeros(())  # autograd keeps a stream of the GPU for each of its operations


@pytest.fixture(autouse=True)
def _small_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernel, uncompiled, and the codecs work on small tensors."""
    monkeypatch.setattr(ema_joined, "_MIN_ELEMENTS", 1)
    monkeypatch.setattr(ema_joined, "_compiled", join_)
    monkeypatch.setattr(codecs, "_MIN_ELEMENTS", 1)


def step(optimizer: Optimizer) -> None:
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()


def train(rule: LookaheadRule, num_steps: int = 4) -> Lookahead:
    lookahead = Lookahead(rule, LookaheadSchedule(0.5, warmup=1)).attach()
    for _ in range(num_steps):
        lookahead.extrapolate()
        step(rule.base_optimizer)
    return lookahead


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_steps_and_looks_do_not_wait(name: str, fused: bool, dtype: torch.dtype) -> None:
    with fake_gpu() as device:
        params = Net(device, dtype).parameters()
        rule = RULES[name](torch.optim.AdamW(params, fused=fused))
        lookahead = train(rule)
        lookahead.extrapolate()
        for _ in range(2):
            with lookahead.at_iterate():
                pass
            if rule.average_decay is not None:
                with lookahead.at_average():
                    pass
        step(rule.base_optimizer)
        lookahead.extrapolate()
        lookahead.skip()
        assert lookahead.step_idx == 6
        for p in rule.store.known_params():
            assert {t.device for t in rule.store.tensors([p])} == {device}
        assert len(rule.store.known_params()) == len(SHAPES)


@pytest.mark.parametrize(
    "kwargs", [{}, {"compile": True}, {"direction_dtype": "int8"}, {"evaluate_at": "average"}]
)
def test_an_attached_loop_does_not_wait(kwargs: dict[str, Any]) -> None:
    """With an evaluation and a look at the state between the forward pass and the step."""
    with fake_gpu() as device:
        net = Net(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        handle = attach_ema_nesterov(optimizer, net, warmup=1, rest=0, **kwargs)
        for _ in range(4):
            net()
            net.state_dict()
            with torch.no_grad():
                net()
            step(optimizer)
            with handle.at_average(0.5):
                net.eval()()
            net.train()
            optimizer.state_dict()
        handle.detach()


def test_the_method_waits_only_for_what_it_logs() -> None:
    with fake_gpu() as device:
        net = Net(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        handle = attach_ema_nesterov(optimizer, net, warmup=0, rest=0)
        net()
        step(optimizer)
        handle.measure_next_step()
        net()
        with pytest.raises(SynchronisationError, match="_to_copy waits"):
            step(optimizer)


class Wasteful(EMADirections):
    """Waits where it is told to."""

    def __init__(self, optimizer: Optimizer, where: str, wait: Callable[[Tensor], object]) -> None:
        super().__init__(optimizer, 0.9)
        self.where = where
        self.wait = wait

    @override
    def begin(self, params: list[Tensor], step_size: float, *, is_measured: bool) -> Fold:
        if self.where == "begin":
            self.wait(params[0].detach())
        return super().begin(params, step_size, is_measured=is_measured)

    @override
    def finish(self, fold: Fold, *, step_idx: int) -> None:
        super().finish(fold, step_idx=step_idx)
        if self.where == "finish":
            self.wait(self.store.column(fold.params)[0])

    @override
    def extrapolate(self, params: list[Tensor], step_size: float) -> None:
        super().extrapolate(params, step_size)
        if self.where == "extrapolate":
            self.wait(params[0].detach())


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda p: p.sum().item(),
    "float": lambda p: float(p.norm()),
    "bool": lambda p: bool((p > 0).all()),
    "if": lambda p: 1 if p.isfinite().all() else 0,
    "tolist": lambda p: p.flatten().tolist(),
    "cpu": lambda p: p.cpu(),
    "tensor": lambda p: torch.tensor([0.5], device=p.device),
    "to": lambda p: torch.zeros(3).to(p.device),
    "copy_": lambda p: torch.zeros(p.shape).copy_(p),
    "nonzero": lambda p: p.nonzero(),
    "equal": lambda p: torch.equal(p, p + 1),
}


@pytest.mark.parametrize("where", ["extrapolate", "begin", "finish"])
@pytest.mark.parametrize("name", WAITS)
def test_a_wait_put_in_by_hand_is_found(name: str, where: str) -> None:
    with fake_gpu() as device:
        optimizer = torch.optim.SGD(Net(device).parameters(), lr=0.1)
        with pytest.raises(SynchronisationError):
            train(Wasteful(optimizer, where, WAITS[name]))


@pytest.mark.parametrize(
    "mix",
    [
        lambda p: p + torch.ones(p.shape),
        lambda p: torch._foreach_add_([p.detach()], [torch.ones(p.shape)]),
        lambda p: torch.stack([p, torch.ones(p.shape)]),
    ],
)
def test_tensors_of_two_devices_are_found(mix: Callable[[Tensor], object]) -> None:
    with fake_gpu() as device:
        optimizer = torch.optim.SGD(Net(device).parameters(), lr=0.1)
        with pytest.raises((MixedDevicesError, RuntimeError), match=r"cpu.*cuda|cuda.*cpu"):
            train(Wasteful(optimizer, "finish", mix))


def test_directions_on_the_host_are_found() -> None:
    class OnHost(EMADirections):
        @override
        def make_state(self, p: Tensor) -> dict[str, Tensor]:
            return {self.keys[0]: torch.zeros(p.shape)}

    with fake_gpu() as device:
        optimizer = torch.optim.SGD(Net(device).parameters(), lr=0.1)
        rule = OnHost(optimizer, 0.9)
        lookahead = Lookahead(rule, LookaheadSchedule(0.5)).attach()
        for p in rule.store.all_params():
            rule.store.put(p, rule.make_state(p))
        with pytest.raises(MixedDevicesError, match="_foreach_add_"):
            lookahead.extrapolate()


class Counts(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Counts the calls of one operation."""

    def __init__(self, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self.name = name
        self.count = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name == self.name
        return func(*args, **(kwargs or {}))


def test_a_learning_rate_on_the_gpu_is_read_once_a_step() -> None:
    """The first exception: the step size on the host follows it."""
    with fake_gpu() as device:
        params = Net(device).parameters()
        optimizer = torch.optim.AdamW(params, lr=1e-3, capturable=True)
        lookahead = train(EMADirections(optimizer, 0.9))
        optimizer.param_groups[0]["lr"] = torch.full((), 1e-3, device=device)
        with pytest.raises(SynchronisationError):
            lookahead.extrapolate()
    reads = Counts("aten::_local_scalar_dense")
    progress = Progress(torch.optim.SGD([torch.zeros(1)], lr=torch.full((), 0.5)))
    with reads:
        assert [progress.lr_ratio(0), progress.lr_ratio(0)] == [1.0, 1.0]
    assert reads.count == 2


def test_the_flag_of_a_scaler_is_read_where_the_optimizer_is_given_it() -> None:
    """The second exception: a fused optimizer skips the step by itself."""
    with fake_gpu() as device:
        optimizer = torch.optim.AdamW(Net(device).parameters(), fused=True)
        train(EMADirections(optimizer, 0.9))
        vars(optimizer)["found_inf"] = torch.zeros((), device=device)
        with pytest.raises(SynchronisationError):
            step(optimizer)


@pytest.mark.parametrize("is_open", [False, True])
def test_a_capture_of_a_step_is_refused(is_open: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the optimizer's part alone; nothing has moved, and training goes on."""
    params = [nn.Parameter(torch.ones(3))]
    lookahead = train(EMADirections(torch.optim.SGD(params, lr=0.1), 0.9))
    if is_open:
        lookahead.extrapolate()
    held = params[0].detach().clone()
    monkeypatch.setattr(window, "_is_captured", lambda: True)
    for action in (lookahead.base_optimizer.step, *(() if is_open else (lookahead.extrapolate,))):
        with pytest.raises(RuntimeError, match="must not be captured in a CUDA graph"):
            action()
    assert torch.equal(params[0], held)
    monkeypatch.undo()
    lookahead.extrapolate()
    assert not torch.equal(params[0], held) or is_open
    step(lookahead.base_optimizer)
    assert lookahead.step_idx == 5
