"""Fabric and plain PyTorch: the same core, moved by the forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import Optimizer

from lightning_ema_nesterov import EMANesterov, attach_ema_nesterov
from lightning_ema_nesterov.attach import EMANesterovHandle
from lightning_ema_nesterov.core.progress import STEP_KEY
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.toys import (
    Batches,
    Toy,
    adamw,
    ema_directions,
    equal,
    relative_error,
    sgd,
    snapshot,
    trajectory_of,
)


class Net(nn.Module):
    """The toy's network without Lightning, with a training step beside its forward."""

    def __init__(self) -> None:
        super().__init__()
        toy = Toy(adamw)
        self.hidden, self.out = toy.hidden, toy.out

    def forward(self, batch: Tensor) -> Tensor:
        error: Tensor = self.out(torch.tanh(self.hidden(batch[:, :4]))) - batch[:, 4:]
        return error.square().mean()

    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = self(batch)
        return loss


def attach(optimizer: Optimizer, module: nn.Module, **kwargs: Any) -> EMANesterovHandle:
    """Attach without warmup and rest, with a decay that acts within few steps."""
    options = {"ema_decay": 0.9, "warmup": 0, "rest": 0, **kwargs}
    return attach_ema_nesterov(optimizer, module, **options)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_plain_pytorch_matches_the_reference(accumulate: int, is_compiled: bool) -> None:
    net = Net()
    module = cast(nn.Module, torch.compile(net, backend="eager")) if is_compiled else net
    optimizer = adamw(net.parameters())
    attach(optimizer, module, warmup=3, rest=0.2, total_steps=20)
    trajectory = trajectory_of(
        Toy(adamw),
        num_steps=20,
        accumulate=accumulate,
        step_size=lambda t: 0.5 if 3 <= t < 16 else 0.0,
    )
    for idx, batch in enumerate(Batches(20 * accumulate).data):
        (module(batch) / accumulate).backward()
        if idx % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad()
            assert relative_error(snapshot(net), trajectory[(idx + 1) // accumulate]) < 1e-5
    assert relative_error(trajectory[-1], trajectory[10]) > 1e-3


class Sees(Net):
    """Remembers the parameters of its last forward pass."""

    seen: list[Tensor]

    def forward(self, batch: Tensor) -> Tensor:
        self.seen = snapshot(self)
        return super().forward(batch)


def test_evaluation_and_checkpoints_in_a_window_see_the_iterate() -> None:
    net, quiet = Sees(), Sees()
    trajectory = trajectory_of(Toy(adamw), num_steps=8, accumulate=2)
    for model, is_watched in ((net, True), (quiet, False)):
        optimizer = adamw(model.parameters())
        handle = attach(optimizer, model)
        for idx, batch in enumerate(Batches(16).data):
            (model(batch) / 2).backward()
            assert idx < 2 or relative_error(model.seen, trajectory[idx // 2]) > 1e-4
            if is_watched and idx % 2 == 0:
                x = trajectory[idx // 2]
                with handle.at_iterate():
                    assert relative_error(snapshot(model), x) < 1e-5
                assert list(model.state_dict()) == ["hidden.weight", "out.weight"]
                assert relative_error(list(model.state_dict().values()), x) < 1e-5
                model.eval()
                model(batch)
                assert relative_error(model.seen, x) < 1e-5
                model.train()
                with torch.no_grad():
                    model(batch)
                assert relative_error(model.seen, x) < 1e-5
            if idx % 2 == 1:
                optimizer.step()
                optimizer.zero_grad()
    assert relative_error(trajectory[4], trajectory[5]) > 1e-3
    assert equal(snapshot(net), snapshot(quiet))


@pytest.mark.parametrize("method", ["forward", "training_step"])
def test_fabric_matches_the_reference(method: str, tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    net = Net()
    model, optimizer = fabric.setup(net, adamw(net.parameters()))
    model.mark_forward_method("training_step")
    handle = attach(optimizer, model)
    trajectory = trajectory_of(Toy(adamw), num_steps=10)
    for step, batch in enumerate(Batches(10).data):
        loss = model(batch) if method == "forward" else model.training_step(batch)
        fabric.backward(loss)
        if step == 5:
            fabric.save(tmp_path / "mid.ckpt", {"model": model, "optimizer": optimizer})
        optimizer.step()
        optimizer.zero_grad()
        assert relative_error(snapshot(net), trajectory[step + 1]) < 1e-5
    saved = torch.load(tmp_path / "mid.ckpt", weights_only=True)
    assert relative_error(list(saved["model"].values()), trajectory[5]) < 1e-5
    m = [state[DIRECTION_KEY] for state in saved["optimizer"]["state"].values()]
    # Displacements are a few thousandths of the parameters, which are rounded to float32.
    assert relative_error(m, ema_directions(trajectory[:6])[-1]) < 1e-3
    handle.detach()
    model(Batches(1).data[0])
    assert relative_error(snapshot(net), trajectory[10]) < 1e-5


def test_optimizer_that_holds_another_is_the_base_optimizer() -> None:
    """Its step does more than the inner one: a displacement has to contain all of it."""

    class Outer(torch.optim.SGD):
        def __init__(self, params: list[nn.Parameter]) -> None:
            super().__init__(params, lr=0.1)
            self.optimizer = torch.optim.SGD(params, lr=0.1)

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            self.optimizer.step()
            for p in self.param_groups[0]["params"]:
                p.mul_(0.9)

    net = Net()
    optimizer = Outer(list(net.parameters()))
    attach(optimizer, net)
    before = snapshot(net)
    net(Batches(1).data[0]).backward()
    optimizer.step()
    for p, x in zip(net.parameters(), before, strict=True):
        m = optimizer.state[p][DIRECTION_KEY]
        torch.testing.assert_close(m, 0.1 * (p.detach() - x), rtol=1e-4, atol=1e-7)


def test_metrics_are_measured_on_request() -> None:
    net = Net()
    optimizer = sgd(net.parameters())
    handle = attach(optimizer, net)
    assert handle.metrics is None
    before = torch.cat([p.flatten() for p in snapshot(net)])
    handle.measure_next_step()
    net(Batches(1).data[0]).backward()
    optimizer.step()
    moved = torch.cat([p.flatten() for p in snapshot(net)]) - before
    assert handle.metrics is not None
    assert handle.metrics.displacement_norm == pytest.approx(moved.norm().item(), rel=1e-4)


def test_detach_in_a_window_returns_to_the_iterate() -> None:
    net = Net()
    optimizer = adamw(net.parameters())
    handle = attach(optimizer, net)
    for batch in Batches(3).data:
        net(batch).backward()
        optimizer.step()
    x = snapshot(net)
    net(Batches(1).data[0])
    assert relative_error(snapshot(net), x) > 1e-6
    handle.detach()
    assert relative_error(snapshot(net), x) < 1e-7
    net(Batches(1).data[0]).backward()
    assert relative_error(snapshot(net), x) < 1e-7
    optimizer.step()
    assert optimizer.param_groups[0][STEP_KEY] == 3


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A process group of one process, so that parameters can be sharded over it."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_steps_and_looks_use_no_collective(one_process: DeviceMesh) -> None:
    """Everything is elementwise on shards; only a step that is measured adds up norms."""
    weight = nn.Parameter(distribute_tensor(torch.ones(6, 4), one_process, [Shard(0)]))
    optimizer = adamw([weight])
    handle = attach(optimizer, nn.ParameterList([weight]), warmup=1, rest=2, total_steps=8)

    def collectives(num_steps: int, *, is_measured: bool = False) -> int:
        with CommDebugMode() as mode:  # type: ignore[no-untyped-call]  # torch has no types here
            for _ in range(num_steps):
                if is_measured:
                    handle.measure_next_step()
                handle.extrapolate()
                with handle.at_iterate():
                    optimizer.state_dict()
                weight.grad = weight.detach().clone()
                optimizer.step()
        return int(mode.get_total_counts())

    def shard() -> Tensor:
        return cast(DTensor, weight).to_local().detach().clone()

    before = shard()
    assert collectives(3) == 0
    assert collectives(1, is_measured=True) > 0
    assert collectives(4) == 0
    assert relative_error([shard()], [before]) > 1e-3


def test_defaults_are_those_of_the_callback() -> None:
    of_callback = inspect.signature(EMANesterov).parameters
    of_function = inspect.signature(attach_ema_nesterov).parameters
    shared = ("lookahead_step_size", "ema_decay", "warmup", "rest", "scale_with_lr", "total_steps")
    for name in (*shared, "compile", "direction_dtype"):
        assert of_function[name].default == of_callback[name].default, name


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lookahead_step_size": 1.0}, r"lookahead_step_size must be in \(-1, 1\), got 1.0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"rest": 10}, "rest = 10 counts from the end of the run.*total_steps"),
        ({"warmup": 0.1}, "warmup = 0.1 is a fraction of the run.*total_steps"),
    ],
)
def test_wrong_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    net = Net()
    before = snapshot(net)
    optimizer = adamw(net.parameters())
    with pytest.raises(ValueError, match=message):
        attach(optimizer, net, **kwargs)
    net(Batches(1).data[0]).backward()
    optimizer.step()
    assert STEP_KEY not in optimizer.param_groups[0]
    assert not equal(snapshot(net), before)


def test_fractions_of_a_run_without_an_end_are_refused_with_what_to_give() -> None:
    """The defaults are fractions: they need the number of steps."""
    net = Net()
    with pytest.raises(ValueError, match="total_steps"):
        attach_ema_nesterov(adamw(net.parameters()), net)


WIDTH = {"float32": 1e-6, "bfloat16": 2e-2, "int8": 5e-2}
"""How far the average is from the iterate, relative error by the narrowest format."""


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("second", WIDTH)
@pytest.mark.parametrize("first", WIDTH)
def test_directions_that_are_there_are_converted(first: str, second: str, is_loaded: bool) -> None:
    """From an attached method that was taken off, or a checkpoint that was loaded before."""
    net = nn.Linear(128, 64, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    handle = attach(optimizer, net, direction_dtype=first)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.ones(1, 128)).square().mean().backward()
        optimizer.step()
    expected = offset_of_average(handle, net)
    state = optimizer.state_dict()
    handle.detach()
    if is_loaded:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        optimizer.load_state_dict(state)
    found = offset_of_average(attach(optimizer, net, direction_dtype=second), net)
    assert relative_error([found], [expected]) < max(WIDTH[first], WIDTH[second])
    assert torch.linalg.vector_norm(expected) > 1e-3


def offset_of_average(handle: EMANesterovHandle, net: nn.Linear) -> Tensor:
    iterate = net.weight.detach().clone()
    with handle.at_average():
        return net.weight.detach() - iterate


def test_a_state_of_a_look_stays_what_it_was() -> None:
    """It is a copy: the parameters move on when the look ends."""
    net = Net()
    optimizer = adamw(net.parameters())
    handle = attach(optimizer, net)
    for batch in Batches(3).data:
        optimizer.zero_grad()
        net(batch).backward()
        optimizer.step()
    x = snapshot(net)
    net(Batches(1).data[0])  # opens a window
    assert not equal(snapshot(net), x)
    with handle.at_iterate():
        at_iterate = net.state_dict()
    optimizer.zero_grad()
    handle.extrapolate()
    assert equal([*at_iterate.values()], x)
    with handle.at_average():
        average, at_average = snapshot(net), net.state_dict()
    assert equal([*at_average.values()], average)
    assert not equal(average, x)
