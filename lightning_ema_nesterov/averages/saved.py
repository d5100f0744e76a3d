"""Weights and EMA directions as checkpoints hold them, one parameter at a time."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lightning_ema_nesterov.core.progress import DECAY_KEY, NAMES_KEY, plain_name
from lightning_ema_nesterov.rules.codecs import Int8
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY, SCALES_KEY

__all__ = ["SavedDirections", "directions_in_file", "directions_in_folder", "is_folder"]

_DIRECTION = re.compile(rf"(?:^|\.)state\.(?P<name>.+)\.{DIRECTION_KEY}$")


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
    def __init__(self, path: Path, keys: Mapping[str, list[str]], decay: float) -> None:
        self._path = path
        self._keys = keys
        self._decay = decay

    def names(self) -> list[str]:
        return list(self._keys)

    def offset(self, name: str) -> Tensor:
        keys = self._keys[name]
        loaded = load_entries(self._path, keys)
        return _read([loaded[key] for key in keys], self._decay)


def _read(stored: list[Tensor], decay: float) -> Tensor:
    direction = Int8().read(stored) if len(stored) > 1 else stored[0]
    wide = torch.promote_types(direction.dtype, torch.float32)
    return direction.to(wide) * (decay / (1.0 - decay))


def directions_in_file(checkpoint: Mapping[str, Any]) -> SavedDirections:
    """Return the directions in the optimizer states of a checkpoint that was loaded.

    Args:
        checkpoint: A mapping that holds one optimizer state or a list of them at some key.

    Raises:
        ValueError: If none was made with EMA-Nesterov, or the names of parameters are not saved.
    """
    found: dict[str, tuple[Mapping[str, Tensor], float]] = {}
    for optimizer in _optimizer_states(checkpoint):
        groups = optimizer["param_groups"]
        decay = groups[0].get(DECAY_KEY)
        names = list(_names(groups))
        for key, state in optimizer["state"].items():
            if DIRECTION_KEY in state:
                name = plain_name(key) if isinstance(key, str) else dict(names).get(key, "")
                _check_known(name, decay)
                found[name] = state, float(decay)
    if not found:
        raise ValueError(
            "The checkpoint must be made with EMA-Nesterov, and no optimizer state in it holds "
            f"{DIRECTION_KEY}."
        )
    return _InFile(found)


def _check_known(name: str, decay: object) -> None:
    if decay is None or not name:
        raise ValueError(
            "The checkpoint must hold the decay and the names of the parameters, and "
            f"{DECAY_KEY if decay is None else NAMES_KEY} is missing: it was made by an older "
            "version. Continue the run for one step and save again."
        )


def _optimizer_states(checkpoint: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for value in checkpoint.values():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Mapping) and {"state", "param_groups"} <= set(part):
                yield part


def _names(groups: list[Mapping[str, Any]]) -> Iterator[tuple[int, str]]:
    for group in groups:
        names = group.get(NAMES_KEY, "").split("\n")
        if len(names) == len(group["params"]):
            yield from zip(group["params"], names, strict=True)


def directions_in_folder(path: Path) -> SavedDirections:
    """Return the directions in a folder of torch.distributed.checkpoint.

    Raises:
        ValueError: If it was not made with EMA-Nesterov, or its decay is not saved.
    """
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    keys: dict[str, list[str]] = {}
    for entry in entries:
        match = _DIRECTION.search(entry)
        if match:
            scales = entry.removesuffix(DIRECTION_KEY) + SCALES_KEY
            keys[plain_name(match["name"])] = [entry, *([scales] if scales in entries else [])]
    if not keys:
        raise ValueError(
            f"The checkpoint must be made with EMA-Nesterov, and {path} holds no {DIRECTION_KEY}."
        )
    decays = [entry for entry in entries if entry.endswith(DECAY_KEY)]
    _check_known("known", decays or None)
    decay = load_entries(path, decays[:1])[decays[0]]
    return _InFolder(path, keys, float(decay))


def load_entries(path: Path, keys: list[str]) -> dict[str, Any]:
    """Load entries of a folder of torch.distributed.checkpoint, whole, on this process alone."""
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    state_dict: dict[str, Any] = {}
    for key in keys:
        entry = metadata[key]
        if isinstance(entry, TensorStorageMetadata):
            state_dict[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
        else:
            state_dict[key] = None
    load(state_dict, storage_reader=FileSystemReader(path), no_dist=True)
    return state_dict


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder of torch.distributed.checkpoint."""
    return (path / ".metadata").is_file()
