"""Which optimizers have a lookahead method: one each, and one for each parameter."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch.optim import Optimizer

__all__ = ["check_params_are_free", "claim", "release"]

# Of each optimizer with a method: whether the calls of a module move its parameters, and not an
# owner that knows all methods of its run.
_claims: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()


def claim(optimizer: Optimizer, *, follows_module: bool) -> None:
    """Note that a method is attached to an optimizer.

    Raises:
        RuntimeError: If one is attached to it already.
    """
    if optimizer in _claims:
        raise RuntimeError(
            f"{type(optimizer).__qualname__} must have one lookahead method, and one is "
            "attached to it already. Detach that one, or make a new optimizer."
        )
    _claims[optimizer] = follows_module


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
    for other, follows_module in _claims.items():
        if other is optimizer or not follows_module:
            continue
        num_shared = sum(p in own for group in other.param_groups for p in group["params"])
        if num_shared:
            raise RuntimeError(
                f"A parameter must have one lookahead method, and {num_shared} of {len(own)} are "
                f"moved for another {type(other).__qualname__} already. Call detach() of the "
                "handle of that one, or make a new model."
            )
