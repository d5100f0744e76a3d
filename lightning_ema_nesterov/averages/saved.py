"""EMA directions as checkpoints hold them, one parameter at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ema_nesterov.averages.folder import Folder
from lightning_ema_nesterov.core.progress import DECAY_KEY, NAMES_KEY, plain_name
from lightning_ema_nesterov.rules.codecs import Int8
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY, SCALES_KEY

__all__ = ["SavedDirections", "directions_in_file", "directions_in_folder"]


class SavedDirections(ABC):
    """The EMA directions of a checkpoint, by the plain names of their parameters."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of the parameters that have a direction."""

    @abstractmethod
    def offset(self, name: str) -> Tensor:
        r"""Return what the average lacks to the iterate, in float32.

        .. math:: x_t - a_t = \frac{\gamma}{1 - \gamma}\, m_t
        """


class _InFile(SavedDirections):
    def __init__(self, states: Mapping[str, tuple[Mapping[str, Tensor], float]]) -> None:
        self._states = states

    def names(self) -> list[str]:
        return list(self._states)

    def offset(self, name: str) -> Tensor:
        state, decay = self._states[name]
        return _read([state[key] for key in (DIRECTION_KEY, SCALES_KEY) if key in state], decay)


class _InFolder(SavedDirections):
    def __init__(self, folder: Folder, entries: Mapping[str, tuple[list[str], float]]) -> None:
        self._folder = folder
        self._entries = entries

    def names(self) -> list[str]:
        return list(self._entries)

    def offset(self, name: str) -> Tensor:
        keys, decay = self._entries[name]
        loaded = self._folder.load(keys)
        return _read([loaded[key] for key in keys], decay)


def _read(stored: list[Tensor], decay: float) -> Tensor:
    direction = Int8().read(stored) if len(stored) > 1 else stored[0]
    wide = torch.promote_types(direction.dtype, torch.float32)
    return direction.to(wide) * (decay / (1.0 - decay))


def directions_in_file(checkpoint: Mapping[str, Any]) -> SavedDirections:
    """Return the directions in the optimizer states of a checkpoint that was loaded.

    Args:
        checkpoint: A mapping with optimizer states in it, or in mappings and lists in it.

    Raises:
        ValueError: If none was made with EMA-Nesterov, or the names of parameters are not saved.
    """
    found: dict[str, tuple[Mapping[str, Tensor], float]] = {}
    for optimizer in _optimizer_states(checkpoint):
        known = {key: (name, decay) for key, name, decay in _params_of(optimizer["param_groups"])}
        for key, state in optimizer["state"].items():
            if DIRECTION_KEY in state:
                name, decay = known.get(key, ("", None))
                _check_known(name, decay)
                found[name] = state, float(decay or 0.0)
    if not found:
        raise ValueError(
            "The checkpoint must be made with EMA-Nesterov, and no optimizer state in it holds "
            f"{DIRECTION_KEY}."
        )
    return _InFile(found)


def _check_known(name: str, decay: float | None) -> None:
    if decay is None or not name:
        raise ValueError(
            "The checkpoint must hold the decay and the names of the parameters, and "
            f"{DECAY_KEY if decay is None else NAMES_KEY} is missing: it was made by an older "
            "version, or the module that was attached to does not own all parameters of the "
            "optimizer. Continue the run for one step and save again."
        )


def _optimizer_states(part: object) -> Iterator[Mapping[str, Any]]:
    if isinstance(part, Mapping):
        if {"state", "param_groups"} <= set(part):
            yield part
            return
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from _optimizer_states(inner)


def _params_of(
    groups: list[Mapping[str, Any]],
) -> Iterator[tuple[int | str, str, float | None]]:
    """Yield the key, the name and the decay of each parameter."""
    decay: float | None = None
    for group in groups:
        decay = group.get(DECAY_KEY, decay)  # each optimizer has it in its first group
        names = group.get(NAMES_KEY, "").split("\n")
        if len(names) != len(group["params"]):
            names = [""] * len(group["params"])
        for key, name in zip(group["params"], names, strict=True):
            yield key, plain_name(key) if isinstance(key, str) else name, decay


def directions_in_folder(folder: Folder) -> SavedDirections:
    """Return the directions in a folder of torch.distributed.checkpoint.

    Raises:
        ValueError: If it was not made with EMA-Nesterov, or its decay is not saved.
    """
    found: dict[str, tuple[list[str], float]] = {}
    for start in folder.optimizers:
        first, last = f"{start}state.", f".{DIRECTION_KEY}"
        keys = [key for key in folder.entries if key.startswith(first) and key.endswith(last)]
        decay = _decay_of(folder, start) if keys else 0.0
        for key in keys:
            name = plain_name(key.removeprefix(first).removesuffix(last))
            scales = key.removesuffix(DIRECTION_KEY) + SCALES_KEY
            found[name] = [key, *([scales] if scales in folder.entries else [])], decay
    if not found:
        raise ValueError(
            f"The checkpoint must be made with EMA-Nesterov, and {folder.path} holds no "
            f"{DIRECTION_KEY}."
        )
    return _InFolder(folder, found)


def _decay_of(folder: Folder, start: str) -> float:
    """Return the decay of the optimizers whose entries begin alike."""
    first, last = f"{start}param_groups.", f".{DECAY_KEY}"
    keys = [key for key in folder.entries if key.startswith(first) and key.endswith(last)]
    decays = {float(decay) for decay in folder.load(keys).values()} if keys else set()
    _check_known("known", min(decays, default=None))
    if len(decays) > 1:
        raise ValueError(
            "Optimizers that are saved as one must have one ema_decay, got "
            f"{', '.join(map(str, sorted(decays)))} in {folder.path}. Save each under a key of "
            "its own."
        )
    return decays.pop()
