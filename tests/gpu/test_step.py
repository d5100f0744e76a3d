"""A step waits for nothing, allocates nothing large, and says what a CUDA graph may hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ema_nesterov import attach_ema_nesterov
from lightning_ema_nesterov.attach import EMANesterovHandle
from lightning_ema_nesterov.experiments.benchmark.measure import FORMS
from tests.toys import relative_error, snapshot

pytestmark = pytest.mark.gpu


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def fused_adamw(params: Iterable[Tensor]) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, fused=True)


def fused_sgd(params: Iterable[Tensor]) -> Optimizer:
    return torch.optim.SGD(params, lr=1e-3, fused=True)


def make_net(width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width, bias=False, device=device, dtype=dtype) for _ in range(4)]
    return nn.Sequential(layers[0], nn.Tanh(), *layers[1:])


def attach(net: nn.Module, optimizer: Optimizer, form: str = "default") -> EMANesterovHandle:
    return attach_ema_nesterov(optimizer, net, ema_decay=0.9, warmup=0, rest=0, **FORMS[form])


def step(net: nn.Module, optimizer: Optimizer, batch: Tensor) -> None:
    optimizer.zero_grad()
    net(batch).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_step_that_is_not_logged_does_not_wait(
    form: str, dtype: torch.dtype, gpu: torch.device
) -> None:
    net = make_net(512, gpu, dtype)
    optimizer, batch = fused_adamw(net.parameters()), torch.ones(8, 512, device=gpu, dtype=dtype)
    handle = attach(net, optimizer, form)
    for _ in range(3):  # compiles, and fills the pools of memory
        step(net, optimizer, batch)
    before = snapshot(net)
    with waiting_is_an_error():
        for _ in range(3):
            step(net, optimizer, batch)
        with handle.at_average():
            pass
    assert relative_error(snapshot(net), before) > 0
    handle.measure_next_step()
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        step(net, optimizer, batch)


# Most bytes that are held at once, over those of the parameters: the copy of the lookahead point,
# and a few blocks of 2 ** 22 elements. As on the CPU, in tests/experiments/test_benchmark.py.
PEAKS = {"default": 0.01, "compile": 0.01, "one_pass": 0.01, "bfloat16": 1.9, "int8": 1.9}


@pytest.mark.parametrize("form", FORMS)
def test_a_step_allocates_nothing_of_the_size_of_the_parameters(
    form: str, gpu: torch.device
) -> None:
    net = make_net(4096, gpu)  # 256 MiB
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    optimizer, batch = fused_sgd(net.parameters()), torch.ones(1, 4096, device=gpu)
    handle = attach(net, optimizer, form)
    for _ in range(3):
        step(net, optimizer, batch)

    def peak_of(action: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / size

    def move_and_step() -> None:
        handle.extrapolate()
        optimizer.step()

    peak = peak_of(move_and_step)
    assert peak <= PEAKS[form]
    assert (peak >= 1.0) == (form in ("bfloat16", "int8"))
    handle.measure_next_step()
    assert peak_of(move_and_step) >= 1.0  # a step that is logged keeps a copy of the direction


@pytest.mark.parametrize("is_open", [False, True])
def test_a_step_in_a_cuda_graph_is_refused_and_training_goes_on(
    is_open: bool, gpu: torch.device
) -> None:
    net = make_net(64, gpu)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, capturable=True)
    batch = torch.ones(8, 64, device=gpu)
    handle = attach(net, optimizer)
    for _ in range(3):
        step(net, optimizer, batch)
    if is_open:
        handle.extrapolate()
    before = snapshot(net)
    graph = torch.cuda.CUDAGraph()
    refused = pytest.raises(RuntimeError, match="must not be captured in a CUDA graph")
    with refused, torch.cuda.graph(graph):
        optimizer.step()
    torch.cuda.synchronize()
    assert relative_error(snapshot(net), before) == 0
    step(net, optimizer, batch)
    assert relative_error(snapshot(net), before) > 0


def test_forward_and_backward_passes_in_cuda_graphs_have_the_same_numbers(
    gpu: torch.device,
) -> None:
    found = {}
    for kind in ("eager", "graphed", "alone"):
        net = make_net(64, gpu)
        optimizer, batch = fused_adamw(net.parameters()), torch.ones(8, 64, device=gpu)
        if kind == "graphed":
            torch.cuda.make_graphed_callables(net, (batch,))
        if kind != "alone":
            attach(net, optimizer)
        for _ in range(20):
            step(net, optimizer, batch)
        found[kind] = snapshot(net)
    # The same kernels; cuBLAS may choose others of float32 for another workspace.
    assert relative_error(found["graphed"], found["eager"]) < 1e-5
    assert relative_error(found["alone"], found["eager"]) > 1e-3
