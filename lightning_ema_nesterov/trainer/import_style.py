"""Which of its two names Lightning was imported by: ``lightning.pytorch`` or ``pytorch_lightning``.

Both packages hold the same code in classes of their own, so that ``isinstance`` with a class of one
is false for an object of the other.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["is_lightning", "lightning_classes", "lightning_function"]

_OLDER = "pytorch_lightning"


def is_lightning(of: type) -> bool:
    """Return whether a class is one of Lightning's own, under either name."""
    return of.__module__.startswith(("lightning.", "pytorch_lightning.", "lightning_fabric."))


def lightning_classes(trainer: object, *paths: str) -> tuple[type, ...]:
    """Return classes of the package that a Trainer is of, to ask ``isinstance`` with.

    Args:
        trainer: The Trainer, also one of a class of the user's.
        paths: What stands after the name of the package.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(logger=False, enable_checkpointing=False)
        >>> lightning_classes(trainer, "callbacks.LambdaCallback")
        (<class 'lightning.pytorch.callbacks.lambda_function.LambdaCallback'>,)
    """
    return tuple(_find(trainer, path) for path in paths)


def lightning_function(trainer: object, path: str) -> Any:
    """Return a function of the package that a Trainer is of, likewise."""
    return _find(trainer, path)


def _find(trainer: object, path: str) -> Any:
    modules = [base.__module__ for base in type(trainer).__mro__]
    is_older = any(m.startswith(f"{_OLDER}.") for m in modules)
    package = _OLDER if is_older else "lightning.pytorch"
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"{package}.{module}"), name)
