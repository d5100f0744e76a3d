"""Ranges of arguments, checked where a user gives them, and what is odd and no error."""

from __future__ import annotations

import warnings

import torch.distributed as dist

__all__ = [
    "check_duration",
    "check_share",
    "check_step_size",
    "check_unit_interval",
    "is_number",
    "warn_on_rank_zero",
]


def check_step_size(name: str, value: float) -> None:
    """Raise unless a number lies in (-1, 1): from 1 on a steady displacement grows forever."""
    if not is_number(value) or not -1 < value < 1:
        raise ValueError(f"{name} must be in (-1, 1), got {value!r}.")


def check_unit_interval(name: str, value: float) -> None:
    """Raise unless a number lies in [0, 1)."""
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}.")


def check_share(name: str, value: float) -> None:
    """Raise unless a number lies in [0, 1]."""
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}.")


def check_duration(name: str, value: int | float) -> None:
    """Raise unless a value is a count of steps or a fraction of the run."""
    if not is_number(value):
        raise ValueError(f"{name} must be a number of steps or a fraction, got {value!r}.")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"{name} must be at least 0 optimizer steps, got {value}.")
    if isinstance(value, float) and not 0 <= value <= 1:
        raise ValueError(
            f"{name} must be in [0, 1] as a fraction of the run (a float), got {value}. "
            "Give a number of optimizer steps as an int."
        )


def is_number(value: object) -> bool:
    """Return whether a value is an ``int`` or a ``float``, and no ``bool``."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def warn_on_rank_zero(message: str) -> None:
    """Warn in one process of those that train together."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        warnings.warn(message, stacklevel=3)
