"""Loops that others write around an attached module, against a slow recursion in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from tests.core import reference
from tests.core.q_network import (
    DECAY,
    NUM_STEPS,
    REWARDS,
    STATES,
    STEP_SIZE,
    QNetwork,
    attach,
    check,
    sgd,
    train_step,
    weights,
)
from tests.toys import equal
from tests.versions import needs_fsdp2_on_cpu


def test_double_dqn_with_a_copied_target_network() -> None:
    model = QNetwork()
    optimizer = sgd(model.parameters())
    attach(optimizer, model)
    target = copy.deepcopy(model)
    for t in range(NUM_STEPS):
        if t % 4 == 0:
            target.load_state_dict(model.state_dict())
        q = model(STATES)
        with torch.no_grad():
            best = model(STATES + 0.1).argmax(dim=1, keepdim=True)
            wanted = REWARDS + 0.9 * target(STATES + 0.1).gather(1, best)
        optimizer.zero_grad()
        (q - wanted).square().mean().backward()
        optimizer.step()

    oracle_target = QNetwork()

    def targets(at_x: QNetwork, x: list[Tensor], t: int) -> Tensor:
        if t % 4 == 0:
            oracle_target.load_state_dict(at_x.state_dict())
        best = at_x(STATES + 0.1).argmax(dim=1, keepdim=True)
        wanted: Tensor = REWARDS + 0.9 * oracle_target(STATES + 0.1).gather(1, best)
        return wanted

    check(model, targets)


def test_self_distillation_from_its_own_evaluation() -> None:
    model = QNetwork()
    optimizer = sgd(model.parameters())
    attach(optimizer, model)
    for _ in range(NUM_STEPS):
        student = model(STATES)
        model.eval()
        wanted = REWARDS + 0.5 * model(STATES.flip(0)).detach()
        model.train()
        optimizer.zero_grad()
        (student - wanted).square().mean().backward()
        optimizer.step()
    check(model, lambda at_x, x, t: REWARDS + 0.5 * at_x(STATES.flip(0)))


def test_mean_teacher_made_after_attach() -> None:
    model = QNetwork()
    optimizer = sgd(model.parameters())
    attach(optimizer, model)
    average: Any = get_ema_multi_avg_fn(0.5)  # type: ignore[no-untyped-call]  # of torch
    teacher = AveragedModel(model, multi_avg_fn=average)
    for _ in range(NUM_STEPS):
        teacher.update_parameters(model)
        student = model(STATES)
        wanted = REWARDS + 0.5 * teacher(STATES).detach()
        optimizer.zero_grad()
        (student - wanted).square().mean().backward()
        optimizer.step()
    averages: list[Tensor] = []

    def targets(at_x: QNetwork, x: list[Tensor], t: int) -> Tensor:
        averages[:] = [0.5 * (a + b) for a, b in zip(averages or x, x, strict=True)]
        other = QNetwork()
        for p, a in zip(other.parameters(), averages, strict=True):
            p.copy_(a)
        wanted: Tensor = REWARDS + 0.5 * other(STATES)
        return wanted

    check(model, targets)


def test_two_optimizers_of_one_module_and_looks_at_it() -> None:
    """As with Muon for matrices and AdamW for the rest: both methods follow the same module."""
    model = QNetwork()
    optimizers = [sgd(model.encoder.parameters()), torch.optim.Adam(model.head.parameters())]
    for optimizer in optimizers:
        attach(optimizer, model)
    for _ in range(NUM_STEPS):
        loss = (model(STATES) - REWARDS).square().mean()
        with torch.no_grad():
            model(STATES)
        model.state_dict()
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    params = [*model.encoder.parameters(), *model.head.parameters()]
    actual = [p.detach() for p in params]
    torch.testing.assert_close(actual, by_two_optimizers(STEP_SIZE), rtol=1e-11, atol=1e-12)
    assert not torch.allclose(by_two_optimizers(0.0)[0], actual[0], rtol=1e-3)


def by_two_optimizers(step_size: float) -> list[Tensor]:
    twin = QNetwork()
    params = [*twin.encoder.parameters(), *twin.head.parameters()]

    def gradients(y: list[Tensor], t: int) -> tuple[Tensor, ...]:
        with torch.no_grad():
            for p, y_i in zip(params, y, strict=True):
                p.copy_(y_i)
        return torch.autograd.grad((twin(STATES) - REWARDS).square().mean(), params)

    class Both(torch.optim.Optimizer):
        def __init__(self, given: list[Tensor]) -> None:
            super().__init__(given, {"lr": 1.0})
            self.parts = [sgd(given[:2]), torch.optim.Adam(given[2:])]

        def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no loss
            for part in self.parts:
                part.step()

    x_0 = [p.detach().clone() for p in params]
    trajectory, _ = reference.train(
        x_0,
        gradients,
        Both,
        num_steps=NUM_STEPS,
        ema_decay=DECAY,
        step_size=lambda t: step_size,
    )
    return trajectory[-1]


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager", fullgraph=True),
        DistributedDataParallel,
        lambda m: DistributedDataParallel(torch.compile(m, backend="eager")),
    ],
    ids=["compile", "DDP", "DDP of compile"],
)
def test_a_look_at_what_is_wrapped_sees_the_iterate(wrap: Callable[[nn.Module], Any]) -> None:
    model = QNetwork()
    wrapper = wrap(model)
    optimizer = sgd(model.parameters())
    attach(optimizer, wrapper)
    for _ in range(NUM_STEPS):
        with torch.no_grad():
            before = model(STATES)
        loss = (wrapper(STATES) - REWARDS).square().mean()
        with torch.no_grad():
            torch.testing.assert_close(model(STATES), before, rtol=1e-12, atol=1e-13)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    check(model, lambda at_x, x, t: REWARDS)


@needs_fsdp2_on_cpu
@pytest.mark.usefixtures("process_group")
def test_weights_that_are_loaded_while_fsdp2_holds_gathered_ones_stay() -> None:
    """In a window: the parameters of the module are then not those of the optimizer."""
    model = QNetwork()
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    optimizer = sgd(model.parameters())
    handle = attach(optimizer, model)
    for _ in range(NUM_STEPS):
        train_step(model, optimizer)
    loaded = {key: torch.ones_like(value) for key, value in model.state_dict().items()}
    model(STATES)
    own = [p for group in optimizer.param_groups for p in group["params"]]
    assert not set(own) & set(model.parameters())
    model.load_state_dict(loaded)
    handle.detach()
    for p in own:
        assert (p.detach().to_local() == 1.0).all()


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_called_before", [False, True])
def test_module_compile_in_place_before_and_after_attach(
    backend: str, is_called_before: bool
) -> None:
    torch._dynamo.reset()
    model = QNetwork()
    optimizer = sgd(model.parameters())
    if is_called_before:
        model.compile(backend=backend)
        model(STATES)
    handle = attach(optimizer, model)
    model.compile(backend=backend)
    for _ in range(NUM_STEPS):
        train_step(model, optimizer)
    check(model, lambda at_x, x, t: REWARDS)
    handle.detach()
    x = weights(model)
    model(STATES)
    assert equal(weights(model), x)


def test_recomputation_of_the_whole_module() -> None:
    model = QNetwork()
    optimizer = sgd(model.parameters())
    attach(optimizer, model)
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        out: Any = checkpoint(model, STATES, use_reentrant=False)
        (out - REWARDS).square().mean().backward()
        optimizer.step()
    check(model, lambda at_x, x, t: REWARDS)
    out = checkpoint(model, STATES.clone().requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="must not run inside of a backward pass"):
        out.sum().backward()
