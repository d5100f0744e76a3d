"""Write the factors of low-rank layers anew, balanced, without a change of their product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_ema_nesterov.core.neighbours import transform
from lightning_ema_nesterov.low_rank.factors import balance
from lightning_ema_nesterov.low_rank.layers import LowRankLinear
from lightning_ema_nesterov.low_rank.step_counter import StepCounter, check_count

__all__ = [
    "WeightRefactorizationHandle",
    "attach_weight_refactorization",
    "layers_of",
    "refactorize_",
]

STEP_KEY = "weight_refactorization_step"
"""Key of the steps taken, in the first parameter group."""


def layers_of(module: nn.Module, optimizer: Optimizer) -> list[LowRankLinear]:
    """Return the low-rank layers of a module that an optimizer trains.

    Raises:
        ValueError: If it trains one factor of a layer and not the other, or if a factor is spread
            over processes.
    """
    own = {p for group in optimizer.param_groups for p in group["params"]}
    found: list[LowRankLinear] = []
    for name, layer in module.named_modules():
        if not isinstance(layer, LowRankLinear):
            continue
        num_own = sum(factor in own for factor in (layer.B, layer.A))
        if num_own == 1:
            raise ValueError(
                f"Both factors of a low-rank layer must have one optimizer, and "
                f"{type(optimizer).__qualname__} has one of those of {name!r}."
            )
        if num_own:
            _check_whole(layer, name)
            found.append(layer)
    return found


def refactorize_(module: nn.Module, optimizers: Sequence[Optimizer] = ()) -> int:
    """Balance the factors of all low-rank layers once, in place; their weights stay.

    To be called after a step of the optimizer and before the next training forward pass. What
    EMA-Nesterov keeps for the factors follows them, so that its lookahead weights stay too. Moments
    of the optimizer are left in the coordinates of the former factors.

    A layer whose product has a lower rank, as at the start with a factor of zeros, stays as it is.

    Args:
        module: The model.
        optimizers: The optimizers of its factors. Needed where EMA-Nesterov is attached to them.

    Returns:
        The number of layers that were changed.

    Raises:
        RuntimeError: If the parameters are at the lookahead point, or at the average.
        ValueError: If a factor is spread over processes.

    Example:
        >>> model = nn.Sequential(LowRankLinear(6, 4, rank=2, bias=False))
        >>> before = model[0].dense_weight()
        >>> refactorize_(model)
        1
        >>> torch.allclose(before, model[0].dense_weight(), atol=1e-6)
        True
    """
    layers = {name: m for name, m in module.named_modules() if isinstance(m, LowRankLinear)}
    for name, layer in layers.items():
        _check_whole(layer, name)
    return _refactorize(list(layers.values()), optimizers)


class WeightRefactorizationHandle:
    """What :func:`attach_weight_refactorization` returns: the way to end it."""

    def __init__(
        self, optimizer: Optimizer, layers: Sequence[LowRankLinear], every_n_steps: int
    ) -> None:
        self.optimizer = optimizer
        self.layers = list(layers)
        self.every_n_steps = every_n_steps
        self._counter = StepCounter(
            optimizer,
            STEP_KEY,
            before=lambda num_steps: None,
            after=self._after,
            cancel=lambda: None,
        )
        self._counter.attach()

    def start_at(self, num_steps: int) -> None:
        """Set how many steps the run took before, unless a checkpoint that was loaded tells."""
        self._counter.start_at(num_steps)

    def detach(self) -> None:
        """Remove the hooks; no refactorization follows."""
        self._counter.detach()

    def _after(self, num_steps: int) -> None:
        if num_steps % self.every_n_steps == 0:
            _refactorize(self.layers, [self.optimizer])


def attach_weight_refactorization(
    optimizer: Optimizer, module: nn.Module, *, every_n_steps: int = 200
) -> WeightRefactorizationHandle:
    """Balance the factors of low-rank layers every so often, in a loop of your own.

    It is done at the end of every ``every_n_steps``-th step of the optimizer, as by
    :func:`refactorize_`. The count is in the optimizer's own state: a run continues from a
    checkpoint bitwise. Attach before or after EMA-Nesterov, and before a distributed checkpoint is
    loaded.

    Args:
        optimizer: The optimizer of the factors.
        module: The model.
        every_n_steps: Steps between two refactorizations, at least 1.

    Returns:
        A handle with ``detach()``.

    Raises:
        ValueError: If ``every_n_steps`` is out of its range; if the optimizer trains no low-rank
            layer, or only one factor of one; if a factor is spread over processes.

    Example:
        >>> model = nn.Sequential(LowRankLinear(6, 4, rank=2, bias=False))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> handle = attach_weight_refactorization(optimizer, model, every_n_steps=1)
        >>> model(torch.ones(1, 6)).sum().backward()
        >>> optimizer.step()
        >>> torch.allclose(model[0].B.T @ model[0].B, model[0].A @ model[0].A.T, atol=1e-5)
        True
    """
    check_count("every_n_steps", every_n_steps, 1)
    layers = layers_of(module, optimizer)
    if not layers:
        raise ValueError(
            f"module must have a LowRankLinear that the optimizer trains, and "
            f"{type(module).__qualname__} has none. Call to_low_rank_(model, rank=...) before the "
            "optimizer is made."
        )
    return WeightRefactorizationHandle(optimizer, layers, every_n_steps)


@torch.no_grad()
def _refactorize(layers: Sequence[LowRankLinear], optimizers: Sequence[Optimizer]) -> int:
    found = [(layer, balance(layer.B, layer.A)) for layer in layers]
    maps: dict[Tensor, Callable[[Tensor], Tensor]] = {}
    for layer, new in found:
        if new is not None:
            maps[layer.B] = partial(_times, right=new.gauge)
            maps[layer.A] = partial(torch.matmul, new.inverse_gauge)
    for optimizer in optimizers:
        transform(optimizer, maps)
    for layer, new in found:
        if new is not None:
            layer.B.copy_(new.B)
            layer.A.copy_(new.A)
    return len(maps) // 2


def _times(left: Tensor, *, right: Tensor) -> Tensor:
    return left @ right


def _check_whole(layer: LowRankLinear, name: str) -> None:
    for factor in (layer.B, layer.A):
        if isinstance(factor, DTensor) or factor.ndim != 2:
            raise ValueError(
                f"The factors of {name!r} must be whole on each process to be refactorized, and "
                "are spread by FSDP or tensor parallelism. Train with DDP (--strategy ddp)."
            )
