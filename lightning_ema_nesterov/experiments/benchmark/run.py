"""What EMA-Nesterov costs: time and memory against a straightforward form and a plain copy."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from lightning_ema_nesterov.experiments.benchmark.average import AverageCost, measure_averages
from lightning_ema_nesterov.experiments.benchmark.measure import Cost, check_case, measure_cost
from lightning_ema_nesterov.experiments.benchmark.model_step import (
    ModelCost,
    check_models,
    measure_model,
)
from lightning_ema_nesterov.experiments.tables import format_table

__all__ = ["run_benchmark"]

_HEADER = [
    "form",
    "elements",
    "tensors",
    "threads",
    "of straightforward",
    "of a copy",
    "method",
    "AdamW step",
    "state",
    "peak",
]

_HEADER_OF_AVERAGES = [
    "average of",
    "elements",
    "tensors",
    "threads",
    "state",
    "evaluating",
    "step",
    "there",
    "back",
]

_HEADER_OF_MODELS = [
    "model",
    "form",
    "elements",
    "tokens",
    "training step",
    "method",
    "share",
    "state",
    "peak",
]


def run_benchmark(
    sizes: Sequence[tuple[int, int]],
    *,
    forms: Sequence[str],
    num_rounds: int,
    num_threads: Sequence[int],
    device: str,
    models: Sequence[str],
    batch_size: int,
    out: Path,
) -> None:
    """Measure sizes, print a table of steps and one of averages, and write a JSON file.

    Args:
        sizes: Pairs of a number of elements and a number of parameters.
        forms: Keys of :data:`FORMS`.
        num_rounds: As for :func:`measure_cost`.
        num_threads: Numbers of threads of torch on a CPU, at least 1.
        device: As torch names it.
        models: Keys of :data:`MODELS`, whose training steps are measured too.
        batch_size: Windows in such a step, at least 1.
        out: The file; its folder is made.

    Raises:
        ValueError: If a number is too small, a form is unknown, or there is no such device; before
            anything is measured.
    """
    if min(num_threads, default=0) < 1:
        raise ValueError(f"num_threads must be at least 1, got {list(num_threads)}.")
    for form in forms:
        for num_elements, num_tensors in sizes:
            check_case(num_elements, num_tensors, form=form, num_rounds=num_rounds)
    check_models(models, batch_size=batch_size)
    _check_device(device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler reports every start and stop
    costs = []
    cases = [(t, form, size) for t in num_threads for form in forms for size in sizes]
    for threads, form, (num_elements, num_tensors) in tqdm(cases, desc="Measuring"):
        torch.set_num_threads(threads)
        costs.append(
            measure_cost(num_elements, num_tensors, form=form, num_rounds=num_rounds, device=device)
        )
    averages = [
        cost for threads in num_threads for cost in _averages(sizes, threads, num_rounds, device)
    ]
    model_costs = [
        cost
        for name in tqdm(models, desc="Models", disable=not models)
        for cost in measure_model(
            name, forms=forms, num_rounds=num_rounds, batch_size=batch_size, device=device
        )
    ]
    machine = {"cpu": _cpu_name(), "torch": torch.__version__, "device": _device_name(device)}
    figures = {**machine, "num_rounds": num_rounds, "costs": [asdict(cost) for cost in costs]}
    figures["averages"] = [asdict(cost) for cost in averages]
    figures["models"] = [asdict(cost) for cost in model_costs]
    figures["us_per_tensor"] = overheads = _overheads(costs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1))
    print(format_table([_HEADER, *(cost.as_row() for cost in costs)]))
    for form, overhead in overheads.items():
        print(f"{form}: {overhead:.1f} us for each further tensor")
    print()
    print(format_table([_HEADER_OF_AVERAGES, *(cost.as_row() for cost in averages)]))
    _print_limit(costs)
    _print_models(model_costs)
    print(f"\nFigures: {out}")


def _averages(
    sizes: Sequence[tuple[int, int]], num_threads: int, num_rounds: int, device: str
) -> list[AverageCost]:
    torch.set_num_threads(num_threads)
    return [
        cost
        for num_elements, num_tensors in tqdm(sizes, desc="Averages")
        for cost in measure_averages(
            num_elements, num_tensors, num_rounds=num_rounds, device=device
        )
    ]


def _print_limit(costs: Sequence[Cost]) -> None:
    """Print how fast memory is, which no form with 4 accesses of an element can be faster than."""
    largest = max(costs, key=lambda cost: cost.num_elements)
    rate = 16 * largest.num_elements / (1e-3 * largest.copy_ms)
    print(f"copy of {largest.num_elements:,} parameters and directions: {1e-9 * rate:.0f} GB/s")


def _print_models(costs: Sequence[ModelCost]) -> None:
    if costs:
        print()
        print(format_table([_HEADER_OF_MODELS, *(cost.as_row() for cost in costs)]))


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises any of them
        [reason, *_] = str(error).splitlines()
        raise ValueError(
            f"device must be one that torch finds here, got {device!r}: {reason}"
        ) from error


def _overheads(costs: Sequence[Cost]) -> dict[str, float]:
    """Return what a further tensor of the smallest model costs in each form, in microseconds."""
    smallest = min(cost.num_elements for cost in costs)
    found = {}
    for form in dict.fromkeys(cost.form for cost in costs):
        # The division into tensors rounds the number of elements.
        rows = [c for c in costs if c.form == form and c.num_elements < 1.5 * smallest]
        rows = [c for c in rows if c.num_threads == rows[0].num_threads]
        few, many = (pick(rows, key=lambda c: c.num_tensors) for pick in (min, max))
        if few.num_tensors < many.num_tensors:
            slope = (many.method_ms - few.method_ms) / (many.num_tensors - few.num_tensors)
            found[form] = 1e3 * slope
    return found


def _device_name(device: str) -> str:
    is_cuda = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if is_cuda else device


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
