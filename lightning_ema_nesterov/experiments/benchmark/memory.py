"""What optimizers keep for each parameter, measured on models that take no memory themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ema_nesterov.experiments.benchmark.optimizers import (
    OPTIMIZERS,
    SIZES,
    known_names,
    make_model,
)
from lightning_ema_nesterov.experiments.tables import format_table
from lightning_ema_nesterov.rules.codecs import DIRECTION_DTYPES
from lightning_ema_nesterov.rules.make import Settings

__all__ = ["StateSize", "as_markdown", "measure_state", "run_memory"]

_HEADER = ["", "numbers", "bytes", *(f"with {dtype}" for dtype in DIRECTION_DTYPES)]


@dataclass(frozen=True)
class StateSize:
    """State of an optimizer over the parameters of the model; for low rank, of the dense model.

    Attributes:
        optimizer: A key of ``OPTIMIZERS``.
        size: A key of ``SIZES``.
        num_parameters: Parameters of the dense model.
        elements: Numbers in the state for each parameter.
        num_bytes: Bytes of the state for each parameter.
        direction_bytes: Bytes of a direction for each parameter, by its dtype.
    """

    optimizer: str
    size: str
    num_parameters: int
    elements: float
    num_bytes: float
    direction_bytes: Mapping[str, float]

    def as_row(self) -> list[str]:
        """Return the cells of a table."""
        sums = [self.num_bytes + self.direction_bytes[dtype] for dtype in DIRECTION_DTYPES]
        return [
            self.optimizer,
            f"{self.elements:.3f}",
            *(f"{value:.2f}" for value in [self.num_bytes, *sums]),
        ]


def measure_state(optimizer: str, size: str, *, device: str = "meta") -> StateSize:
    """Measure the state of an optimizer after one step, with float32 parameters.

    Args:
        optimizer: A key of ``OPTIMIZERS``.
        size: A key of ``SIZES``.
        device: As torch names it. ``"meta"``: shapes and dtypes without memory.
    """
    model = make_model(SIZES[size], device)
    num_parameters = _num_elements(model.parameters())
    made = OPTIMIZERS[optimizer](model, SIZES[size])
    _take_step(made)
    states = list(made.state.values())
    tensors = [t for state in states for t in _tensors(state)]
    return StateSize(
        optimizer=optimizer,
        size=size,
        num_parameters=num_parameters,
        elements=_num_elements(tensors) / num_parameters,
        num_bytes=_num_bytes(tensors) / num_parameters,
        direction_bytes={
            dtype: _direction_bytes(made, dtype) / num_parameters for dtype in DIRECTION_DTYPES
        },
    )


def run_memory(sizes: list[str], optimizers: list[str], out: Path) -> None:
    """Measure optimizers, print a table for each size, and write them as Markdown.

    Args:
        sizes: Keys of ``SIZES``, or ``all``.
        optimizers: Keys of ``OPTIMIZERS``, or ``all``.
        out: The file; its folder is made.

    Raises:
        ValueError: If a name is not known; before anything is measured.
    """
    sizes = known_names("sizes", sizes, SIZES)
    optimizers = known_names("optimizers", optimizers, OPTIMIZERS)
    parts = []
    for size in sizes:
        rows = [_HEADER, *(measure_state(name, size).as_row() for name in optimizers)]
        print(f"LLaMA {size}\n\n{format_table(rows)}\n")
        parts.append(f"## LLaMA {size}\n\n{as_markdown(rows)}\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(parts))
    print(f"Tables: {out}")


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as a table of Markdown; the first row is the head.

    Example:
        >>> print(as_markdown([["", "bytes"], ["AdamW", "8"]]))
        |  | bytes |
        |---|---|
        | AdamW | 8 |
    """
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _take_step(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    # torchao compiles its step, which has no kernel to run here.
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()


def _direction_bytes(optimizer: Optimizer, direction_dtype: str) -> int:
    """What EMA-Nesterov puts into the state in a parameter's first step."""
    rule = Settings(direction_dtype=direction_dtype).rule(optimizer)
    made = [rule.make_state(p) for p in rule.store.all_params()]
    return _num_bytes([t for state in made for t in state.values()])


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a state, which may hold lists of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _num_elements(tensors: Any) -> int:
    return sum(t.numel() for t in tensors)


def _num_bytes(tensors: list[Tensor]) -> int:
    total = 0
    for t in tensors:
        flatten = getattr(t, "__tensor_flatten__", None)
        if flatten is not None and not isinstance(t, nn.Parameter):  # codes and their scales
            total += _num_bytes([getattr(t, name) for name in flatten()[0]])
        else:
            total += t.numel() * t.element_size()
    return total
