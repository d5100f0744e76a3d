"""Which optimizers have a lookahead method: one each, and one for each parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning_ema_nesterov.core import lookahead as method

__all__ = ["check_params_are_free", "claim", "find_lookahead", "release"]

# The method of each optimizer that has one. A method holds its optimizer, whose hooks hold it.
_claims: WeakKeyDictionary[Optimizer, ReferenceType[method.Lookahead]] = WeakKeyDictionary()


def find_lookahead(optimizer: Optimizer) -> method.Lookahead | None:
    """Return the method that is attached to an optimizer, ``None`` if there is none."""
    found = _claims.get(optimizer)
    return None if found is None else found()


def claim(lookahead: method.Lookahead) -> None:
    """Note that a method is attached to its optimizer.

    Raises:
        RuntimeError: If one is attached to it already.
    """
    optimizer = lookahead.base_optimizer
    if optimizer in _claims:
        raise RuntimeError(
            f"{type(optimizer).__qualname__} must have one lookahead method, and one is "
            "attached to it already. Detach that one, or make a new optimizer."
        )
    _claims[optimizer] = ref(lookahead)


def release(optimizer: Optimizer) -> None:
    """Note that no method is attached to an optimizer any more."""
    _claims.pop(optimizer, None)


def check_params_are_free(optimizer: Optimizer) -> None:
    """Raise where the calls of a module move parameters of an optimizer for another one.

    That one, of a former call, would go on moving them and never step.

    Args:
        optimizer: The optimizer that a method will be attached to.

    Raises:
        RuntimeError: If they do.
    """
    own = {p for group in optimizer.param_groups for p in group["params"]}
    for other in list(_claims):
        lookahead = find_lookahead(other)
        if other is optimizer or lookahead is None or not lookahead.follows_module:
            continue
        num_shared = sum(p in own for group in other.param_groups for p in group["params"])
        if num_shared:
            raise RuntimeError(
                f"A parameter must have one lookahead method, and {num_shared} of {len(own)} are "
                f"moved for another {type(other).__qualname__} already. Call detach() of the "
                "handle of that one, or make a new model."
            )
