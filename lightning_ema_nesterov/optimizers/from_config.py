"""Optimizers from the ``class_path`` and ``init_args`` that a LitGPT YAML names."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

__all__ = [
    "build_optimizer",
    "check_place",
    "find_module",
    "import_optimizer",
    "is_named_in_yaml",
    "yaml_key",
]

# Where in the YAML the function stands that is being called: functions name optimizers in turn.
_OUTERMOST = "optimizer"
_place: ContextVar[str] = ContextVar("_place", default=_OUTERMOST)


def yaml_key(argument: str) -> str:
    """Return where in the YAML an argument of the function stands that is being called."""
    return f"{_place.get()}.init_args.{argument}"


def is_named_in_yaml() -> bool:
    """Whether an optimizer is being made for a YAML, by a function here or by LitGPT's own."""
    if _place.get() != _OUTERMOST:
        return True
    code = getattr(_litgpts_function(), "__code__", None)
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def _litgpts_function() -> object:
    # It calls the class that `optimizer.class_path` names with nothing but model.parameters().
    return getattr(sys.modules.get("litgpt.utils"), "instantiate_torch_optimizer", None)


def find_module(params: ParamsT) -> nn.Module | None:
    """Return the module whose ``parameters()`` these are, ``None`` if that cannot be told.

    Args:
        params: What LitGPT gives an optimizer: a generator that nobody has read from.
    """
    if not inspect.isgenerator(params):
        return None
    module = inspect.getgeneratorlocals(params).get("self")
    return module if isinstance(module, nn.Module) else None


def check_place(function: str, allowed: Mapping[str, str]) -> None:
    """Raise if the YAML names a function where it would not do what it promises.

    Args:
        function: Its name.
        allowed: Keys where it may be named, with how to say so.

    Raises:
        ValueError: If it is named at another key.
    """
    if _place.get() not in allowed:
        raise ValueError(
            f"{_place.get()} names {function}, which must be {' or '.join(allowed.values())}."
        )


def build_optimizer(
    spec: str | Mapping[str, Any], params: ParamsT, *, key: str, fused: bool = False
) -> Optimizer:
    """Make the optimizer that a YAML names.

    Args:
        spec: A name like ``AdamW`` or ``torch.optim.AdamW``, or a mapping with ``class_path`` and
            ``init_args``. The name may be that of a function.
        params: What the optimizer gets as its parameters.
        key: Where in the YAML ``spec`` is, for messages; :func:`yaml_key` tells a function.
        fused: Passed on if the optimizer has an argument of this name and ``init_args`` does not.

    Raises:
        TypeError: If ``spec`` is neither, if ``init_args`` do not fit, or if no optimizer is named.
        ValueError: If ``spec`` lacks a key or names what cannot be imported, or if the optimizer
            refuses a value or a parameter.

    Example:
        >>> import torch
        >>> weights = [torch.nn.Parameter(torch.zeros(2))]
        >>> spec = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
        >>> build_optimizer(spec, weights, key="base").defaults["lr"]
        0.5
    """
    path, init_args = _read(spec, key)
    factory = import_optimizer(path, key)
    try:
        accepted = inspect.signature(factory).parameters
    except (TypeError, ValueError) as error:
        raise TypeError(f"{key} must name an optimizer, and {path} is not callable.") from error
    if "fused" in accepted:
        init_args = {"fused": fused, **init_args}
    try:
        inspect.signature(factory).bind(params, **init_args)
    except TypeError as error:
        raise TypeError(f"{key}.init_args do not fit {path}: {error}.") from error
    optimizer = _call(factory, params, init_args, key=key, path=path)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{key} must name a torch.optim.Optimizer or a function that returns one, and {path} "
            f"gives {type(optimizer).__module__}.{type(optimizer).__qualname__}."
        )
    return optimizer


def _call(
    factory: Callable[..., object],
    params: ParamsT,
    init_args: Mapping[str, Any],
    *,
    key: str,
    path: str,
) -> object:
    token = _place.set(key)
    try:
        return factory(params, **init_args)
    except (IndexError, TypeError, ValueError) as error:
        if not isinstance(factory, type):
            raise  # a function of ours, which tells its key
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{key} ({path}) refuses its init_args or the model: {error}") from error
    finally:
        _place.reset(token)


def _read(spec: str | Mapping[str, Any], key: str) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec, Mapping):
        raise TypeError(f"{key} must be a name, or have class_path and init_args, got {spec!r}.")
    for name, kind in (("class_path", str), ("init_args", Mapping)):
        if not isinstance(spec.get(name), kind):
            raise ValueError(
                f"{key}.{name} is missing: {key} must have class_path and init_args, got {spec!r}."
            )
    return spec["class_path"], dict(spec["init_args"])


def import_optimizer(path: str, key: str) -> Callable[..., object]:
    """Import an optimizer, or a function that returns one.

    Args:
        path: A dotted path, or the name of an optimizer of ``torch.optim``.
        key: Where in the YAML this is, for messages.

    Raises:
        TypeError: If it is a class of another kind.
        ValueError: If there is none.
    """
    module, _, name = (path if "." in path else f"torch.optim.{path}").rpartition(".")
    try:
        found: Callable[..., object] = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        message = f"{key} names {path}, which cannot be imported: {error}."
        if "." not in path:
            known = (n for n, c in vars(torch.optim).items() if isinstance(c, type))
            message += f" Known without a dot are {', '.join(sorted(known))}."
        raise ValueError(message) from error
    if isinstance(found, type) and not issubclass(found, Optimizer):
        raise TypeError(f"{key} must name a torch.optim.Optimizer, and {path} is another class.")
    return found
