"""What EMA-Nesterov costs: time and memory against a straightforward form and a plain copy."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from typing_extensions import override

from lightning_ema_nesterov.direction import DIRECTION_KEY, EMADirections
from lightning_ema_nesterov.lookahead import Lookahead
from lightning_ema_nesterov.report import format_table
from lightning_ema_nesterov.schedule import LookaheadSchedule

__all__ = ["Cost", "measure_cost", "run_benchmark"]

STEP_SIZE, EMA_DECAY = 0.5, 0.99


@dataclass(frozen=True)
class Cost:
    """Medians over interleaved rounds, float32.

    Attributes:
        num_elements: Elements of all parameters.
        num_tensors: Parameters, of equal size.
        method_ms: Time of the method alone: a step of a base optimizer that does nothing.
        straightforward_ms: Time of the same arithmetic, with a copy of the former iterate and one
            tensor after the other.
        copy_ms: Time of copying as many bytes as the parameters and the directions have.
        adamw_ms: Time of a step of AdamW, without a forward and backward pass.
        adamw_with_method_ms: Time of that step with the method.
        state_per_element: Elements that the method keeps for each element of a parameter.
        largest_transient: Elements of the largest tensor that the method makes in a step, over
            those of the largest parameter.
    """

    num_elements: int
    num_tensors: int
    method_ms: float
    straightforward_ms: float
    copy_ms: float
    adamw_ms: float
    adamw_with_method_ms: float
    state_per_element: float
    largest_transient: float

    def as_dict(self) -> dict[str, Any]:
        """Return the figures and their ratios."""
        return {
            **asdict(self),
            "method_over_straightforward": self.method_ms / self.straightforward_ms,
            "method_over_copy": self.method_ms / self.copy_ms,
        }


class _Still(SGD):
    """A base optimizer that leaves the parameters alone."""

    @override
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        return None


class _Straightforward:
    """The equations with two buffers: a copy of the former iterate, and the direction."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params
        self.iterates = [torch.zeros_like(p) for p in params]
        self.directions = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        for p, iterate, direction in zip(self.params, self.iterates, self.directions, strict=True):
            iterate.copy_(p)
            p.add_(direction, alpha=STEP_SIZE)
        for p, iterate, direction in zip(self.params, self.iterates, self.directions, strict=True):
            direction.mul_(EMA_DECAY).add_(p - iterate, alpha=1.0 - EMA_DECAY)


class _LargestAllocation(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Notes the largest tensor that an operation makes."""

    largest = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in _tensors(args)}
        for tensor in _tensors((made,)):
            if tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.numel())
        return made


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def run_benchmark(
    sizes: Sequence[tuple[int, int]], *, num_rounds: int, num_threads: int, device: str, out: Path
) -> None:
    """Measure sizes, print a table, and write a JSON file.

    Args:
        sizes: Pairs of a number of elements and a number of parameters.
        num_rounds: As for :func:`measure_cost`.
        num_threads: Threads of torch on a CPU, at least 1.
        device: As torch names it.
        out: The file; its folder is made.

    Raises:
        ValueError: If a number is too small.
    """
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}.")
    torch.set_num_threads(num_threads)
    rows = [["elements", "tensors", "method", "of straightforward", "of a copy", "AdamW step"]]
    costs = []
    for num_elements, num_tensors in tqdm(sizes, desc="Measuring"):
        cost = measure_cost(num_elements, num_tensors, num_rounds=num_rounds, device=device)
        costs.append(cost.as_dict())
        rows.append(
            [
                f"{cost.num_elements:,}",
                f"{num_tensors:,}",
                f"{cost.method_ms:.1f} ms",
                f"{cost.method_ms / cost.straightforward_ms:.2f}",
                f"{cost.method_ms / cost.copy_ms:.2f}",
                f"{cost.adamw_ms:.1f} to {cost.adamw_with_method_ms:.1f} ms",
            ]
        )
    machine = {"torch": torch.__version__, "device": device, "num_threads": num_threads}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**machine, "num_rounds": num_rounds, "costs": costs}, indent=1))
    print(f"{format_table(rows)}\n\nFigures: {out}")


def measure_cost(
    num_elements: int, num_tensors: int, *, num_rounds: int = 15, device: str = "cpu"
) -> Cost:
    """Measure one size.

    Args:
        num_elements: Elements of all parameters, rounded down to a multiple of ``num_tensors``.
        num_tensors: Parameters, at least 1.
        num_rounds: Rounds, in each of which everything is timed once; at least 1.
        device: As torch names it.

    Raises:
        ValueError: If a number is too small.
    """
    if not 1 <= num_tensors <= num_elements or num_rounds < 1:
        raise ValueError(
            "num_elements must be at least num_tensors, and num_tensors and num_rounds at least 1, "
            f"got {num_elements}, {num_tensors} and {num_rounds}."
        )
    actions, method = _prepare(num_elements // num_tensors, num_tensors, device)
    times: dict[str, list[float]] = {name: [] for name in actions}
    for round_idx in range(num_rounds + 2):  # the first two warm up
        for name, action in actions.items():
            with _timed(device) as elapsed:
                action()
            if round_idx >= 2:
                times[name].append(elapsed[0])
    params = method.base_optimizer.param_groups[0]["params"]
    with _LargestAllocation() as allocation:  # type: ignore[no-untyped-call]  # torch's
        actions["method"]()
    state = [method.base_optimizer.state[p][DIRECTION_KEY] for p in params]
    elements = sum(p.numel() for p in params)
    return Cost(
        num_elements=elements,
        num_tensors=num_tensors,
        **{f"{name}_ms": 1e3 * statistics.median(values) for name, values in times.items()},
        state_per_element=sum(m.numel() for m in state) / elements,
        largest_transient=allocation.largest / params[0].numel(),
    )


def _prepare(
    size: int, num_tensors: int, device: str
) -> tuple[dict[str, Callable[[], Any]], Lookahead]:
    params = [torch.ones(size, device=device, requires_grad=True) for _ in range(num_tensors)]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    straightforward = _Straightforward(params)
    copies = [torch.zeros_like(p) for p in params]
    adamw = AdamW(params, lr=1e-6)
    still, looking = _looking(_Still(params, lr=1e-6)), _looking(AdamW(params, lr=1e-6))

    @torch.no_grad()
    def copy() -> None:
        for p, target in zip(params, copies, strict=True):
            target.copy_(p)
        for m, target in zip(straightforward.directions, copies, strict=True):
            target.copy_(m)

    def step(lookahead: Lookahead) -> None:
        lookahead.extrapolate()
        lookahead.base_optimizer.step()

    return {
        "method": lambda: step(still),
        "straightforward": straightforward.step,
        "copy": copy,
        "adamw": adamw.step,
        "adamw_with_method": lambda: step(looking),
    }, still


def _looking(optimizer: Optimizer) -> Lookahead:
    directions = EMADirections(optimizer, EMA_DECAY)
    return Lookahead(optimizer, LookaheadSchedule(STEP_SIZE), directions).attach()


@contextmanager
def _timed(device: str) -> Iterator[list[float]]:
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.synchronize(device)
    elapsed: list[float] = []
    start = time.perf_counter()
    yield elapsed
    if is_cuda:
        torch.cuda.synchronize(device)
    elapsed.append(time.perf_counter() - start)
