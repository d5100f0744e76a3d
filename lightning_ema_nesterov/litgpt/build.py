"""Optimizers from the ``class_path`` and ``init_args`` that a LitGPT YAML names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

__all__ = ["build_optimizer", "import_optimizer"]


def build_optimizer(
    spec: str | Mapping[str, Any], params: ParamsT, *, key: str, fused: bool = False
) -> Optimizer:
    """Make the optimizer that a YAML names.

    Args:
        spec: A name like ``AdamW`` or ``torch.optim.AdamW``, or a mapping with ``class_path`` and
            ``init_args``. The name may be that of a function.
        params: What the optimizer gets as its parameters.
        key: Where in the YAML this is, for messages.
        fused: Passed on if the optimizer has an argument of this name and ``init_args`` does not.

    Raises:
        TypeError: If ``spec`` is neither, if ``init_args`` do not fit, or if no optimizer is named.
        ValueError: If ``spec`` lacks a key, or names what cannot be imported.

    Example:
        >>> import torch
        >>> weights = [torch.nn.Parameter(torch.zeros(2))]
        >>> spec = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
        >>> build_optimizer(spec, weights, key="optimizer").defaults["lr"]
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
    optimizer = factory(params, **init_args)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{key} must name a torch.optim.Optimizer or a function that returns one, and {path} "
            f"gives {type(optimizer).__module__}.{type(optimizer).__qualname__}."
        )
    return optimizer


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
    return found
