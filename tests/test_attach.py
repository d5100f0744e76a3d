"""Fabric and plain PyTorch: the same core, moved by the forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_ema_nesterov import attach_ema_nesterov
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.core import reference
from tests.toys import Batches, Toy, adamw, batch_gradients, relative_error, sgd, snapshot


class Net(nn.Module):
    """The toy's network without Lightning, with a training step beside its forward."""

    def __init__(self) -> None:
        super().__init__()
        toy = Toy(adamw)
        self.hidden, self.out = toy.hidden, toy.out
        self.steps = 0

    def forward(self, batch: Tensor) -> Tensor:
        error: Tensor = self.out(torch.tanh(self.hidden(batch[:, :4]))) - batch[:, 4:]
        return error.square().mean()

    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = self(batch)
        return loss


def expected(num_steps: int, accumulate: int = 1, **kwargs: Any) -> list[list[Tensor]]:
    toy = Toy(adamw)
    batches = Batches(num_steps * accumulate, torch.float64).data
    options = {"ema_decay": 0.9, "step_size": lambda _: 0.5, **kwargs}
    trajectory, _ = reference.train(
        snapshot(toy),
        batch_gradients(toy, batches, accumulate),
        adamw,
        num_steps=num_steps,
        **options,
    )
    return trajectory


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_plain_pytorch_matches_the_reference(accumulate: int, is_compiled: bool) -> None:
    net = Net()
    module = torch.compile(net, backend="eager") if is_compiled else net
    optimizer = adamw(net.parameters())
    attach_ema_nesterov(optimizer, module, ema_decay=0.9, warmup=3, rest=0.2, total_steps=20)
    trajectory = expected(20, accumulate, step_size=lambda t: 0.5 if 3 <= t < 16 else 0.0)
    for idx, batch in enumerate(Batches(20 * accumulate).data):
        (module(batch) / accumulate).backward()
        if idx % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad()
            assert relative_error(snapshot(net), trajectory[(idx + 1) // accumulate]) < 1e-5
    assert relative_error(trajectory[-1], trajectory[10]) > 1e-3


def test_evaluation_and_checkpoints_in_a_window_see_the_iterate() -> None:
    net, quiet = Net(), Net()
    trajectory = expected(8, 2)
    for model, is_watched in ((net, True), (quiet, False)):
        optimizer = adamw(model.parameters())
        handle = attach_ema_nesterov(optimizer, model, ema_decay=0.9)
        for idx, batch in enumerate(Batches(16).data):
            (model(batch) / 2).backward()
            if is_watched and idx % 2 == 0:
                x = trajectory[idx // 2]
                with handle.at_iterate():
                    assert relative_error(snapshot(model), x) < 1e-5
                assert list(model.state_dict()) == ["hidden.weight", "out.weight"]
                assert relative_error(list(model.state_dict().values()), x) < 1e-5
                model.eval()
                model(batch)
                assert relative_error(snapshot(model), x) < 1e-5
                model.train()
                with torch.no_grad():
                    model(batch)
                assert relative_error(snapshot(model), x) < 1e-5
            if idx % 2 == 1:
                optimizer.step()
                optimizer.zero_grad()
    assert relative_error(trajectory[4], trajectory[5]) > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(snapshot(net), snapshot(quiet), strict=True))


@pytest.mark.parametrize("method", ["forward", "training_step"])
def test_fabric_matches_the_reference(method: str, tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    net = Net()
    model, optimizer = fabric.setup(net, adamw(net.parameters()))
    model.mark_forward_method("training_step")
    handle = attach_ema_nesterov(optimizer, model, ema_decay=0.9)
    trajectory = expected(10)
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
    assert all(DIRECTION_KEY in state for state in saved["optimizer"]["state"].values())
    handle.detach()
    assert not model._forward_pre_hooks


def test_optimizer_that_holds_another_is_the_base_optimizer() -> None:
    """Its step does more than the inner one: a displacement has to contain all of it."""

    class Outer(torch.optim.SGD):
        def __init__(self, params: list[nn.Parameter]) -> None:
            super().__init__(params, lr=0.1)
            self.optimizer = torch.optim.SGD(params, lr=0.1)

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            self.optimizer.step()
            for p in self.param_groups[0]["params"]:
                p.mul_(0.9)

    net = Net()
    optimizer = Outer(list(net.parameters()))
    attach_ema_nesterov(optimizer, net, ema_decay=0.9)
    before = snapshot(net)
    net(Batches(1).data[0]).backward()
    optimizer.step()
    for p, x in zip(net.parameters(), before, strict=True):
        m = optimizer.state[p][DIRECTION_KEY]
        torch.testing.assert_close(m, 0.1 * (p.detach() - x), rtol=1e-4, atol=1e-7)


def test_metrics_are_measured_on_request() -> None:
    net = Net()
    optimizer = sgd(net.parameters())
    handle = attach_ema_nesterov(optimizer, net)
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
    handle = attach_ema_nesterov(optimizer, net)
    for batch in Batches(3).data:
        net(batch).backward()
        optimizer.step()
    x = snapshot(net)
    net(Batches(1).data[0])
    assert relative_error(snapshot(net), x) > 1e-6
    handle.detach()
    assert relative_error(snapshot(net), x) < 1e-7
    net(Batches(1).data[0])
    assert relative_error(snapshot(net), x) < 1e-7


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lookahead_step_size": 1.0}, r"lookahead_step_size must be in \[0, 1\)"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        ({"rest": 10}, "rest = 10 counts from the end of the run"),
        ({"warmup": 0.1}, "warmup = 0.1 is a fraction of the run"),
    ],
)
def test_wrong_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    net = Net()
    with pytest.raises(ValueError, match=message):
        attach_ema_nesterov(adamw(net.parameters()), net, **kwargs)
    assert not net._forward_pre_hooks
