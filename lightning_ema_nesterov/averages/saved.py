"""EMA directions as checkpoints hold them, one parameter at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ema_nesterov.averages.folder import Folder
from lightning_ema_nesterov.core.progress import DECAY_KEY, NAMES_KEY, STEP_KEY, plain_name
from lightning_ema_nesterov.rules.codecs import Int8
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY, SCALES_KEY

__all__ = ["SavedDirections", "directions_in_file", "directions_in_folder"]


class SavedDirections(ABC):
    """The EMA directions of a checkpoint, by the plain names of their parameters.

    Args:
        steps: Steps that each optimizer took with the method; 0 for one without it.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        self._steps = steps

    def check_are_current(self, checkpoint: Mapping[str, Any]) -> None:
        """Raise where a run of the Trainer went on without the method after its last step with it.

        Args:
            checkpoint: What the Trainer saved beside the weights; nothing is checked elsewhere.

        Raises:
            ValueError: If it did: the directions are those of an earlier step.
        """
        global_step = checkpoint.get("global_step")
        if not isinstance(global_step, int) or _counts_skipped_steps(checkpoint):
            return
        # In manual optimization that is the sum over all optimizers; a run that was begun without
        # the method counts an equal part of it for each.
        if sum(self._steps) < global_step - (len(self._steps) - 1):
            raise ValueError(
                "The direction in a checkpoint must be that of its last step, and EMA-Nesterov took"
                f" {sum(self._steps):,} of its {global_step:,} optimizer steps: the run went on "
                "without the method. Use a checkpoint from before that, or continue this one with "
                "EMANesterov, whose average then starts anew."
            )

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of the parameters that have a direction."""

    @abstractmethod
    def offset(self, name: str) -> Tensor:
        r"""Return what the average lacks to the iterate, in float32.

        .. math:: x_t - a_t = \frac{\gamma}{1 - \gamma}\, m_t
        """


def _counts_skipped_steps(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether the Trainer counted steps that GradScaler skipped and the method did not."""
    epoch_loop = "epoch_loop.manual_optimization.optim_step_progress"
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get(epoch_loop, {})
    is_manual = progress.get("total", {}).get("completed", 0) > 0
    parts = [part for part in checkpoint.values() if isinstance(part, Mapping)]
    return is_manual and any("growth_factor" in part for part in parts)


class _InFile(SavedDirections):
    def __init__(
        self, states: Mapping[str, tuple[Mapping[str, Tensor], float]], steps: Sequence[int]
    ) -> None:
        super().__init__(steps)
        self._states = states

    def names(self) -> list[str]:
        return list(self._states)

    def offset(self, name: str) -> Tensor:
        state, decay = self._states[name]
        return _read([state[key] for key in (DIRECTION_KEY, SCALES_KEY) if key in state], decay)


class _InFolder(SavedDirections):
    def __init__(
        self,
        folder: Folder,
        entries: Mapping[str, tuple[list[str], float]],
        steps: Sequence[int],
    ) -> None:
        super().__init__(steps)
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
    steps = []
    for optimizer in _optimizer_states(checkpoint):
        steps.append(max(0, int(optimizer["param_groups"][0].get(STEP_KEY, 0))))
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
    return _InFile(found, steps)


def _check_known(name: str, decay: float | None) -> None:
    if decay is None or not name:
        raise ValueError(
            "The checkpoint must hold the decay and the names of the parameters, and "
            f"{DECAY_KEY if decay is None else NAMES_KEY} is missing: it was made by an older "
            "version, or the module that was attached to does not own all parameters of the "
            "optimizer. Continue the run for one step and save again, in a loop of your own with "
            "get_optimizer_state_dict() of torch, which saves names."
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
    steps = []
    for start in folder.optimizers:
        first, last = f"{start}state.", f".{DIRECTION_KEY}"
        keys = [key for key in folder.entries if key.startswith(first) and key.endswith(last)]
        decay = _decay_of(folder, start) if keys else 0.0
        numbered = _names_of_numbers(folder, start) if keys else {}
        steps.append(max([0, *_values_of_groups(folder, start, STEP_KEY)]))
        for key in keys:
            name = plain_name(key.removeprefix(first).removesuffix(last))
            if numbered:
                name = numbered.get(name, "")
                _check_known(name, decay)
            scales = key.removesuffix(DIRECTION_KEY) + SCALES_KEY
            found[name] = [key, *([scales] if scales in folder.entries else [])], decay
    if not found:
        raise ValueError(
            f"The checkpoint must be made with EMA-Nesterov, and {folder.path} holds no "
            f"{DIRECTION_KEY}."
        )
    return _InFolder(folder, found, steps)


def _decay_of(folder: Folder, start: str) -> float:
    """Return the decay of the optimizers whose entries begin alike."""
    decays = set(map(float, _values_of_groups(folder, start, DECAY_KEY)))
    _check_known("known", min(decays, default=None))
    if len(decays) > 1:
        raise ValueError(
            "Optimizers that are saved as one must have one ema_decay, got "
            f"{', '.join(map(str, sorted(decays)))} in {folder.path}. Save each under a key of "
            "its own."
        )
    return decays.pop()


def _names_of_numbers(folder: Folder, start: str) -> dict[str, str]:
    """Return the names of parameters that the optimizer's own ``state_dict()`` has numbered.

    Empty for a checkpoint that names them itself.
    """
    found: dict[str, str] = {}
    for key in _keys_of_groups(folder, start, "params"):
        numbers = folder.load([key])[key]
        if isinstance(numbers, list) and all(isinstance(number, int) for number in numbers):
            names_key = key.removesuffix("params") + NAMES_KEY
            saved = folder.load([names_key])[names_key] if names_key in folder.entries else ""
            names = saved.split("\n")
            if len(names) != len(numbers):
                names = [""] * len(numbers)
            found.update(zip(map(str, numbers), names, strict=True))
    return found


def _keys_of_groups(folder: Folder, start: str, option: str) -> list[str]:
    first, last = f"{start}param_groups.", f".{option}"
    return [key for key in folder.entries if key.startswith(first) and key.endswith(last)]


def _values_of_groups(folder: Folder, start: str, option: str) -> list[Any]:
    """Return an option of all parameter groups that have it."""
    keys = _keys_of_groups(folder, start, option)
    return list(folder.load(keys).values()) if keys else []
