"""What others who change an optimizer or its parameters have to tell the lookahead method on it.

In any order: the method may be attached before or after they are, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor
from torch.optim import Optimizer

from lightning_ema_nesterov.core.claims import find_lookahead

__all__ = ["bring_back", "set_aside", "transform"]


def set_aside(optimizer: Optimizer, params: Iterable[Tensor]) -> None:
    """Take what the lookahead method keeps out of the optimizer's state, during a step.

    Most optimizers take a parameter with any state for one that they have initialized.

    Args:
        optimizer: The optimizer, with a method or without.
        params: Parameters of it.
    """
    lookahead = find_lookahead(optimizer)
    if lookahead is not None:
        lookahead.rule.store.set_aside(params)


def bring_back(optimizer: Optimizer) -> None:
    """Undo :func:`set_aside`."""
    lookahead = find_lookahead(optimizer)
    if lookahead is not None:
        lookahead.rule.store.bring_back()


def transform(optimizer: Optimizer, maps: Mapping[Tensor, Callable[[Tensor], Tensor]]) -> None:
    """Apply to what the lookahead method keeps the linear maps that parameters are changed by.

    So no displacement between two iterates contains the change.

    Args:
        optimizer: The optimizer, with a method or without.
        maps: For some of its parameters, a linear map of tensors of its shape, in float64.

    Raises:
        RuntimeError: Where the parameters are not at the iterate: between a training forward pass
            and the optimizer's step, or inside of ``at_average()``.
    """
    lookahead = find_lookahead(optimizer)
    if lookahead is None:
        return
    if lookahead.is_open or lookahead.is_paused or lookahead.is_at_average:
        raise RuntimeError(
            "Parameters must hold the iterate when they are written in other coordinates, and are "
            "elsewhere: do it after the optimizer's step and before the next training forward "
            "pass, outside of at_average()."
        )
    lookahead.rule.make_state_readable()
    for p in lookahead.rule.store.known_params():
        if p in maps:
            lookahead.rule.transform(p, maps[p])
