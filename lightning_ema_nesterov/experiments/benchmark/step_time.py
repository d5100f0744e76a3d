"""How long a step of each base optimizer takes, relative to AdamW's."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_ema_nesterov.experiments.benchmark.optimizers import (
    OPTIMIZERS,
    SIZES,
    known_names,
    make_model,
)
from lightning_ema_nesterov.experiments.tables import format_table

__all__ = ["StepTime", "measure_steps", "run_step_times"]

_HEADER = ["", "over AdamW", "step", "first step"]


@dataclass(frozen=True)
class StepTime:
    """Times of a step without a forward and backward pass.

    Attributes:
        optimizer: A key of ``OPTIMIZERS``.
        over_adamw: Median over rounds of the ratio of the step to one of AdamW right before it.
        step_ms: Median of the step.
        first_step_ms: The first step, which makes the state: with GaLore and Fira it has the
            decomposition that is repeated every ``update_proj_gap`` steps.
    """

    optimizer: str
    over_adamw: float
    step_ms: float
    first_step_ms: float

    def as_row(self) -> list[str]:
        """Return the cells of a table."""
        times = f"{self.step_ms:.1f} ms", f"{self.first_step_ms:.1f} ms"
        return [self.optimizer, f"{self.over_adamw:.2f}", *times]


def measure_steps(
    optimizer: str, size: str, *, num_layers: int, num_rounds: int, device: str = "cpu"
) -> StepTime:
    """Time the steps of an optimizer, and of AdamW in turn.

    Args:
        optimizer: A key of ``OPTIMIZERS``.
        size: A key of ``SIZES``.
        num_layers: Blocks of the model, at least 1.
        num_rounds: Rounds, of which the median is taken, at least 1.
        device: As torch names it.
    """
    adamw, other = (_started(name, size, num_layers, device) for name in ("AdamW", optimizer))
    first = _time(other, device)
    _time(adamw, device)
    rounds = [(_time(adamw, device), _time(other, device)) for _ in range(num_rounds + 1)][1:]
    found = StepTime(
        optimizer=optimizer,
        over_adamw=statistics.median(b / a for a, b in rounds),
        step_ms=statistics.median(b for _, b in rounds),
        first_step_ms=first,
    )
    del adamw, other
    gc.collect()
    return found


def run_step_times(
    optimizers: Sequence[str],
    num_rounds: int,
    *,
    size: str = "60M",
    num_layers: int = 2,
    num_threads: int = 1,
    device: str = "cpu",
    out: Path,
) -> None:
    """Time optimizers, print a table, and write a JSON file.

    Args:
        optimizers: Keys of ``OPTIMIZERS``, or ``all``.
        num_rounds: Rounds, at least 1.
        size: A key of ``SIZES``.
        num_layers: Blocks of the model, at least 1.
        num_threads: Threads of torch on a CPU, at least 1.
        device: As torch names it.
        out: The file; its folder is made.

    Raises:
        ValueError: If a name is not known or a number too small; before anything is measured.
    """
    names = known_names("optimizers", optimizers, OPTIMIZERS)
    known_names("size", [size], SIZES)
    numbers = {"num_layers": num_layers, "num_rounds": num_rounds, "num_threads": num_threads}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    torch.set_num_threads(num_threads)
    rows = [
        measure_steps(name, size, num_layers=num_layers, num_rounds=num_rounds, device=device)
        for name in names
    ]
    figures = {"size": size, **numbers, "device": device, "torch": torch.__version__}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**figures, "steps": [asdict(row) for row in rows]}, indent=1))
    print(format_table([_HEADER, *(row.as_row() for row in rows)]))
    print(f"\nFigures: {out}")


def _started(name: str, size: str, num_layers: int, device: str) -> Optimizer:
    model: nn.Module = make_model(SIZES[size], device, num_layers=num_layers)
    optimizer = OPTIMIZERS[name](model, SIZES[size])
    for p in model.parameters():
        p.grad = torch.randn_like(p).mul_(1e-3)
    return optimizer


def _time(optimizer: Optimizer, device: str) -> float:
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    optimizer.step()
    if is_cuda:
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)
