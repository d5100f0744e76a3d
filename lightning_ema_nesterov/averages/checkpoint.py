"""From a checkpoint made with EMA-Nesterov to a checkpoint of the averaged weights."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from tqdm import tqdm

from lightning_ema_nesterov.averages.folder import Folder
from lightning_ema_nesterov.averages.saved import (
    SavedDirections,
    directions_in_file,
    directions_in_folder,
)
from lightning_ema_nesterov.core.checks import check_share
from lightning_ema_nesterov.core.progress import plain_name

__all__ = ["average_checkpoint"]

_VERSION_KEY = "pytorch-lightning_version"
# What only a run that goes on needs. The last two are of Lightning's WeightAveraging.
_STATE_OF_TRAINING = (
    "optimizer_states",
    "lr_schedulers",
    "callbacks",
    "loops",
    "current_model_state",
    "averaging_state",
)
_USUAL_NAMES = ("model", "state_dict")
_T = TypeVar("_T")
_SECONDS_WITHOUT_PROGRESS = 2.0


def average_checkpoint(source: str | Path, target: str | Path, share: float = 1.0) -> None:
    r"""Write the average of the iterates that a checkpoint holds, as plain weights.

    .. math:: x_t - s\, \frac{\gamma}{1 - \gamma}\, m_t

    Each average is computed in float32, or the weight's dtype where that is wider, and rounded
    once. A parameter without a direction, as one that is frozen, is its own average. It needs
    neither the model's class nor its devices, and the memory of about one copy of the weights.

    What is written depends on the source:

    * a ``.ckpt`` file or a distributed folder of the Trainer: a ``.ckpt`` with ``state_dict``,
      hyper-parameters and what else the module saved, for ``load_from_checkpoint``;
    * a ``lit_model.pth`` of LitGPT, or another file with ``model`` and ``optimizer``: a file with
      ``model``; the configuration and tokenizer files beside a ``lit_model.pth`` are copied along;
    * a file or a distributed folder of a loop of your own, with Fabric or not: a plain
      ``state_dict``.

    Files are unpickled, so the source must be one that you trust.

    Args:
        source: A checkpoint made with EMA-Nesterov, a file or a folder.
        target: File to write. Its folder is made.
        share: Share :math:`s` of the way from the iterate to the average, in [0, 1].

    Raises:
        FileExistsError: If ``target`` exists.
        FileNotFoundError: If ``source`` does not exist.
        ValueError: If ``share`` is out of its range, if ``source`` is no whole checkpoint, or was
            made without EMA-Nesterov, or by the Trainer in a run that went on without it. Nothing
            is written then.
    """
    source, target = Path(source), Path(target)
    check_share("share", share)
    if not source.exists():
        raise FileNotFoundError(f"source must be a checkpoint, and {source} does not exist.")
    if target.exists():
        raise FileExistsError(f"target must not exist, and {target} does.")
    made = _of_folder(source, share) if source.is_dir() else _of_file(source, share)
    target.parent.mkdir(parents=True, exist_ok=True)
    incomplete = target.with_name(f"{target.name}.incomplete")
    try:
        torch.save(made, incomplete)
        os.replace(incomplete, target)
    finally:
        incomplete.unlink(missing_ok=True)
    if source.name == "lit_model.pth":
        _copy_neighbours(source.parent, target.parent)


def _of_file(source: Path, share: float) -> dict[str, Any]:
    try:
        # Mapped: what is not asked for is not read.
        checkpoint = torch.load(source, map_location="cpu", mmap=True, weights_only=False)
    except Exception as error:  # torch and pickle have many for a file that is cut off
        message = f"source must be a whole checkpoint, and {source} cannot be read: {error}"
        raise ValueError(message) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"source must be a checkpoint, and {source} holds a {type(checkpoint)}.")
    directions = directions_in_file(checkpoint)
    if "optimizer_states" in checkpoint:  # of the Trainer
        directions.check_are_current(checkpoint)
        # WeightAveraging of Lightning has its own average where the iterate would be.
        weights = checkpoint.get("current_model_state", checkpoint["state_dict"])
        return _as_ckpt(_average(weights, weights.__getitem__, directions, share), checkpoint)
    candidates = {
        name: part
        for name, part in checkpoint.items()
        if isinstance(part, Mapping) and _owns(part, directions)
    }
    name, weights = _only(candidates, checkpoint)
    averaged = _average(weights, weights.__getitem__, directions, share)
    return {"model": averaged} if name == "model" else averaged


def _owns(weights: Iterable[str], directions: SavedDirections) -> bool:
    names = [name for name in weights if isinstance(name, str)]  # a bare optimizer has numbers
    return set(_by_plain_name(names, directions)).issuperset(directions.names())


def _only(candidates: Mapping[str, _T], names: Iterable[str]) -> tuple[str, _T]:
    """Return the weights among what a checkpoint holds, and their name in it."""
    usual = [name for name in _USUAL_NAMES if name in candidates]
    found = usual[:1] or list(candidates)
    if len(found) == 1:
        return found[0], candidates[found[0]]
    held = f"has both {' and '.join(map(repr, found))}" if found else f"has {', '.join(names)}"
    raise ValueError(
        "source must hold one set of weights beside the optimizer, with the names that the "
        f"optimizer's parameters have, or one of them as 'model', and {held}."
    )


def _of_folder(source: Path, share: float) -> dict[str, Any]:
    folder = Folder(source)
    directions = directions_in_folder(folder)
    start = _start_of_weights(folder, directions)
    keys = {
        key.removeprefix(start): key
        for key, entry in folder.entries.items()
        if key.startswith(start)
        and not folder.is_of_optimizer(key)
        and (isinstance(entry, TensorStorageMetadata) or key.endswith("_extra_state"))
    }

    def read(name: str) -> Any:
        return folder.load([keys[name]])[keys[name]]

    shapes = {name: _shape_of(folder.entries[key]) for name, key in keys.items()}
    meta_file = source / "meta.pt"
    meta = torch.load(meta_file, weights_only=False) if meta_file.is_file() else {}
    is_of_trainer = any(key.startswith("optimizer_0.") for key in folder.entries)
    if is_of_trainer and _VERSION_KEY not in meta:
        raise ValueError(
            f"source must be a whole checkpoint, and {source} has no meta.pt of the Trainer."
        )
    directions.check_are_current(meta)
    averaged = _average(shapes, read, directions, share)
    return _as_ckpt(averaged, meta) if _VERSION_KEY in meta else averaged


def _shape_of(entry: object) -> Tensor | None:
    if isinstance(entry, TensorStorageMetadata):
        return torch.empty(entry.size, device="meta")
    return None


def _start_of_weights(folder: Folder, directions: SavedDirections) -> str:
    """Return what the keys of all weights begin with."""
    keys = [key for key in folder.entries if not folder.is_of_optimizer(key)]
    name = directions.names()[0]
    candidates: dict[str, str] = {}
    for key in keys:
        parts = key.split(".")
        for idx in range(len(parts)):
            start = "".join(f"{part}." for part in parts[:idx])
            if plain_name(key.removeprefix(start)) == name:
                own = [k.removeprefix(start) for k in keys if k.startswith(start)]
                if _owns(own, directions):
                    candidates[start.removesuffix(".")] = start
                break  # what is left of wrappers is a part of the name
    outermost = {
        place: start
        for place, start in candidates.items()
        if not any(start != other and start.startswith(other) for other in candidates.values())
    }
    return _only(outermost, dict.fromkeys(key.partition(".")[0] for key in keys))[1]


def _by_plain_name(weights: Iterable[str], directions: SavedDirections) -> dict[str, str]:
    named = {plain_name(name): name for name in weights}
    if directions.names()[0] not in named and all(name.startswith("module.") for name in named):
        return {plain.removeprefix("module."): name for plain, name in named.items()}  # of DDP
    return named


def _average(
    weights: Mapping[str, Any],
    read: Callable[[str], Any],
    directions: SavedDirections,
    share: float,
) -> dict[str, Any]:
    """Return the averages of all weights; those of tied ones once.

    Args:
        weights: Names, and tensors of their shapes; what is no tensor stays what it is.
        read: Returns a weight.
        directions: The directions, by plain names.
        share: Share of the way from the iterate to the average.
    """
    named = _by_plain_name(weights, directions)
    missing = [name for name in directions.names() if name not in named]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(directions.names())} directions have no weight in the "
            f"checkpoint (first: {missing[0]!r})."
        )
    moving = [named[plain] for plain in directions.names()]
    resting = [name for name in weights if name not in set(moving)]
    resting_shapes = {w.shape for w in map(weights.__getitem__, resting) if isinstance(w, Tensor)}
    made: dict[str, Any] = {}
    moved: dict[bytes, str] = {}
    progress = tqdm(directions.names(), desc="Averaging", delay=_SECONDS_WITHOUT_PROGRESS)
    for plain, name in zip(progress, moving, strict=True):
        x = read(name)
        if x.shape in resting_shapes:
            moved[_digest(x)] = name
        made[name] = _moved(x, directions.offset(plain), share)
    moving_shapes = {made[name].shape for name in moving}
    for name in resting:
        x = read(name)
        if isinstance(x, Tensor):
            # A tied weight has one direction, under the first of its names.
            is_tied = x.numel() > 1 and x.shape in moving_shapes
            twin = moved.get(_digest(x)) if is_tied else None
            x = x.clone() if twin is None else made[twin]
        made[name] = x
    return {name: made[name] for name in weights}


def _moved(x: Tensor, offset: Tensor, share: float) -> Tensor:
    wide = torch.promote_types(x.dtype, offset.dtype)
    return (x.to(wide) - share * offset.to(wide)).to(x.dtype)


def _digest(x: Tensor) -> bytes:
    """Return what only tensors share that are equal, bit for bit; no copy of them is kept."""
    raw = x.detach().contiguous().flatten().view(torch.uint8).numpy()
    made = hashlib.blake2b(f"{x.dtype}{tuple(x.shape)}".encode())
    made.update(raw.data)
    return made.digest()


def _as_ckpt(averaged: dict[str, Any], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in checkpoint.items() if key not in _STATE_OF_TRAINING}
    return {**rest, "state_dict": averaged}


def _copy_neighbours(source: Path, target: Path) -> None:
    for pattern in ("*.yaml", "*.json", "tokenizer*"):
        for path in source.glob(pattern):
            if path.is_file() and not (target / path.name).exists():
                shutil.copy(path, target / path.name)
