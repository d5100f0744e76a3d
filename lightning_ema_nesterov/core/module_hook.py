"""A hook of one module: copies of the module have none."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

__all__ = ["EagerModuleHook", "ModuleHook", "Owner"]


class Owner(Protocol):
    """Has the actions of hooks."""

    def check_copy(self) -> None:
        """Raise where the module must not be copied."""


class ModuleHook:
    """Calls an action for the module that it was made for; copies of the module have none.

    Args:
        module: The module.
        owner: Whose action it is, and who is asked before the module is copied.
        action: Name of the method that is called with the module and what the hook is called with.
    """

    def __init__(self, module: nn.Module, owner: Owner, action: str) -> None:
        self._module = weakref.ref(module)
        self._owner = owner
        self._action: Callable[..., None] = getattr(owner, action)

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Call the action, unless this hook was copied with its module."""
        if module is self._module():
            self._action(module, *args)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        self._owner.check_copy()
        return _do_nothing_hook, ()  # for copy.deepcopy and pickle


class EagerModuleHook(ModuleHook):
    """Likewise, but leaves no trace in a graph of torch.compile."""

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Call the action outside of a compiled graph."""
        if not torch.compiler.is_compiling():
            super().__call__(module, *args)


def _do_nothing_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*args: Any) -> None:
    return
