"""The classes that the YAML of a study names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule

from lightning_ema_nesterov import EMANesterov, peers

__all__ = ["check_arguments", "find_class"]

_KINDS: dict[str, type] = {
    "model": LightningModule,
    "data": LightningDataModule,
    "callbacks": Callback,
    "methods": Callback,
}

_METHODS: dict[str, Callable[..., Any]] = {
    "EMANesterov": EMANesterov,
    **{name: getattr(peers, name) for name in peers.__all__},
}


def find_class(path: str, key: str) -> Callable[..., Any]:
    """Import a class, or a function that makes an instance.

    Args:
        path: A dotted path; for a method also the name of one of ours.
        key: Where in the YAML it stands, beginning with ``model``, ``data``, ``callbacks`` or
            ``methods``.

    Raises:
        ValueError: If there is none, or one of another kind; the message says what is expected.
    """
    section = key.partition(".")[0]
    kind = _KINDS[section]
    if section == "methods" and path in _METHODS:
        return _METHODS[path]
    expected = f"the dotted path of a {kind.__name__}"
    if section == "methods":
        expected = f"one of {', '.join(_METHODS)}, or {expected}"
    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name)
    except (ImportError, SyntaxError, ValueError) as error:
        reason = str(error) if module_name else "it has no dot"
        raise ValueError(
            f"{key}.class_path must be {expected}, beside the YAML or installed, and {path!r} "
            f"cannot be imported: {reason}."
        ) from error
    found: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(found) or (isinstance(found, type) and not issubclass(found, kind)):
        raise ValueError(
            f"{key}.class_path must be {expected}, and {path!r} is none. {_listed(module, kind)}"
        )
    return found


def _listed(module: ModuleType, kind: type) -> str:
    known = [n for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, kind)]
    return f"In {module.__name__} there are: {', '.join(sorted(known)) or 'none'}."


def check_arguments(
    called: Callable[..., Any], init_args: Mapping[str, Any], key: str, *, num_before: int = 0
) -> None:
    """Raise unless a class accepts its arguments.

    Args:
        called: The class, or a function.
        init_args: Its arguments.
        key: Where in the YAML they stand.
        num_before: Arguments that it gets before them.

    Raises:
        ValueError: If one is unknown or missing.
    """
    signature = inspect.signature(called)
    known = signature.parameters
    unknown = [name for name in init_args if name not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        raise ValueError(
            f"{key}.init_args has the unknown key {unknown[0]!r}; known are {', '.join(known)}."
        )
    try:
        signature.bind(*[None] * num_before, **init_args)
    except TypeError as error:
        raise ValueError(f"{key}.init_args do not fit {called.__name__}: {error}.") from error
