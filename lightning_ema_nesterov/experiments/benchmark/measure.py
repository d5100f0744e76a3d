"""What one step of EMA-Nesterov costs, in one form and at one size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile
from typing_extensions import override

from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.rule import LookaheadRule
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.rules.make import Settings

__all__ = [
    "EMA_DECAY",
    "FORMS",
    "STEP_SIZE",
    "Cost",
    "PausableAdamW",
    "check_case",
    "measure_cost",
    "peak_bytes",
    "rule_of",
    "shapes_of",
    "timed",
]

STEP_SIZE, EMA_DECAY = 0.5, 0.99

LARGEST_SHARE = 0.3
"""Share of the largest tensor, as of the embedding in GPT-2 124M; the others are of equal size."""

FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "compile": {"compile": True},
    "one_pass": {"compile": True, "ends_late": True},
    "bfloat16": {"direction_dtype": "bfloat16"},
    "int8": {"direction_dtype": "int8"},
}
"""What is measured; ``one_pass`` is ``compile=True`` where nobody can look between two steps."""


@dataclass(frozen=True)
class Cost:
    """Medians over interleaved rounds, float32 parameters.

    Attributes:
        form: A key of :data:`FORMS`.
        num_elements: Elements of all parameters.
        num_tensors: Parameters.
        num_threads: Threads of torch.
        method_over_straightforward: Median of the ratio of the two times.
        method_over_copy: Median of the ratio of the two times.
        method_ms: Time of the method alone: a step of a base optimizer that does nothing.
        straightforward_ms: Time of the same arithmetic, with a copy of the former iterate and one
            tensor after the other.
        copy_ms: Time of copying as many bytes as float32 parameters and directions have.
        adamw_ms: Time of a step of AdamW, without a forward and backward pass.
        adamw_with_method_ms: Time of that step with the method.
        state_per_element: Bytes that the method keeps between steps, over those of the parameters.
        peak_per_element: Most bytes that the method allocates in a step and holds at once, as the
            profiler sees them, over those of the parameters.
    """

    form: str
    num_elements: int
    num_tensors: int
    num_threads: int
    method_over_straightforward: float
    method_over_copy: float
    method_ms: float
    straightforward_ms: float
    copy_ms: float
    adamw_ms: float
    adamw_with_method_ms: float
    state_per_element: float
    peak_per_element: float

    def as_row(self) -> list[str]:
        """Return the cells of a table."""
        return [
            self.form,
            f"{self.num_elements:,}",
            f"{self.num_tensors:,}",
            f"{self.num_threads}",
            f"{self.method_over_straightforward:.2f}",
            f"{self.method_over_copy:.2f}",
            f"{self.method_ms:.1f} ms",
            f"{self.adamw_ms:.1f} to {self.adamw_with_method_ms:.1f} ms",
            f"{self.state_per_element:.3f}",
            f"{self.peak_per_element:.3f}",
        ]


class PausableAdamW(AdamW):
    """AdamW that can leave the parameters alone."""

    is_still = False

    @override
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        if not self.is_still:
            super().step()


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


def peak_bytes(action: Callable[[], Any], device: str = "cpu") -> int:
    """Return how much more memory is held at once during an action than before."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        action()
    results = found.profiler.kineto_results if found.profiler else None
    events = results.events() if results else []
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held: list[int] = list(accumulate(int(num_bytes) for _, num_bytes in changes))
    return max(held, default=0)


def check_case(num_elements: int, num_tensors: int, *, form: str, num_rounds: int) -> None:
    """Raise unless :func:`measure_cost` can measure it.

    Raises:
        ValueError: If a number is too small, or the form is unknown.
    """
    if not 1 <= 2 * num_tensors <= num_elements or num_rounds < 1:
        raise ValueError(
            "num_elements must be at least 2 * num_tensors, and num_tensors and num_rounds at "
            f"least 1, got {num_elements}, {num_tensors} and {num_rounds}."
        )
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}.")


def measure_cost(
    num_elements: int,
    num_tensors: int,
    *,
    form: str = "default",
    num_rounds: int = 15,
    device: str = "cpu",
) -> Cost:
    """Measure one form at one size.

    Args:
        num_elements: Elements of all parameters, rounded to what ``num_tensors`` allow.
        num_tensors: Parameters, at least 1.
        form: A key of :data:`FORMS`.
        num_rounds: Rounds, in each of which everything is timed once; at least 1.
        device: As torch names it.

    Raises:
        ValueError: If a number is too small, or the form is unknown.
    """
    check_case(num_elements, num_tensors, form=form, num_rounds=num_rounds)
    actions, lookahead = _prepare(shapes_of(num_elements, num_tensors), form, device)
    times: dict[str, list[float]] = {name: [] for name in actions}
    for round_idx in range(num_rounds + 2):  # the first two warm up
        lookahead.attach()
        for name, action in actions.items():
            if name == "adamw":
                lookahead.detach()  # an end that is late is not on its account
            with timed(device) as elapsed:
                action()
            if round_idx >= 2:
                times[name].append(1e3 * elapsed[0])
    lookahead.attach()
    peak = peak_bytes(actions["method"], device)
    params = lookahead.base_optimizer.param_groups[0]["params"]
    num_bytes = 4 * sum(p.numel() for p in params)
    state = lookahead.rule.store.tensors(params)
    return Cost(
        form=form,
        num_elements=num_bytes // 4,
        num_tensors=num_tensors,
        num_threads=torch.get_num_threads(),
        method_over_straightforward=_ratio(times["method"], times["straightforward"]),
        method_over_copy=_ratio(times["method"], times["copy"]),
        **{f"{name}_ms": statistics.median(values) for name, values in times.items()},
        state_per_element=sum(m.numel() * m.element_size() for m in state) / num_bytes,
        peak_per_element=peak / num_bytes,
    )


def _ratio(times: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def shapes_of(num_elements: int, num_tensors: int) -> list[tuple[int, ...]]:
    """Return the shapes of parameters, one of them large as an embedding is."""
    largest = num_elements if num_tensors == 1 else int(LARGEST_SHARE * num_elements)
    sizes = [largest] + [(num_elements - largest) // max(1, num_tensors - 1)] * (num_tensors - 1)
    width = 256  # matrices, so that int8 applies to them
    return [(size // width, width) if size >= width else (size,) for size in sizes]


def _prepare(
    shapes: Sequence[tuple[int, ...]], form: str, device: str
) -> tuple[dict[str, Callable[[], Any]], Lookahead]:
    params = [torch.full(shape, 0.02, device=device, requires_grad=True) for shape in shapes]
    straightforward = _Straightforward(params)
    for p, iterate in zip(params, straightforward.iterates, strict=True):
        p.grad = iterate  # any numbers will do
    optimizer = PausableAdamW(params, lr=1e-6)
    lookahead = Lookahead(rule_of(optimizer, form), LookaheadSchedule(STEP_SIZE))

    @torch.no_grad()
    def copy() -> None:
        # A GPU copies many small tensors at once; on a CPU this is one after the other.
        torch._foreach_copy_(straightforward.iterates, params)
        torch._foreach_copy_(straightforward.iterates, straightforward.directions)

    def step(*, is_still: bool) -> None:
        optimizer.is_still = is_still
        lookahead.extrapolate()
        optimizer.step()

    def adamw() -> None:
        optimizer.is_still = False
        optimizer.step()

    return {
        # In this order: `method` then begins as it does in a run, after a step.
        "adamw_with_method": lambda: step(is_still=False),
        "method": lambda: step(is_still=True),
        "straightforward": straightforward.step,
        "copy": copy,
        "adamw": adamw,
    }, lookahead


@contextmanager
def timed(device: str) -> Iterator[list[float]]:
    """Time a ``with`` block; the list has its seconds afterwards."""
    elapsed: list[float] = []
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        yield elapsed
        elapsed.append(time.perf_counter() - start)
        return
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        make_event: Any = torch.cuda.Event
        first, last = make_event(enable_timing=True), make_event(enable_timing=True)
        first.record()
        yield elapsed
        last.record()
        last.synchronize()
    elapsed.append(1e-3 * first.elapsed_time(last))


def rule_of(optimizer: Optimizer, form: str) -> LookaheadRule:
    """Return what :data:`FORMS` says, for an optimizer."""
    settings = dict(FORMS[form])
    ends_late = settings.pop("ends_late", False)
    return Settings(STEP_SIZE, EMA_DECAY, **settings).rule(optimizer, ends_late=ends_late)
