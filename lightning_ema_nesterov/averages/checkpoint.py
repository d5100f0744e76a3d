"""From a checkpoint made with EMA-Nesterov to a checkpoint of the averaged weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from tqdm import tqdm

from lightning_ema_nesterov.averages.saved import (
    SavedDirections,
    directions_in_file,
    directions_in_folder,
    is_folder,
    load_entries,
)
from lightning_ema_nesterov.core.checks import check_share
from lightning_ema_nesterov.core.progress import plain_name

__all__ = ["average_checkpoint"]

_KEPT_OF_LIGHTNING = ("pytorch-lightning_version", "epoch", "global_step")
_SECONDS_WITHOUT_PROGRESS = 2.0


def average_checkpoint(source: str | Path, target: str | Path, share: float = 1.0) -> None:
    r"""Write the average of the iterates that a checkpoint holds, as plain weights.

    .. math:: x_t - s\, \frac{\gamma}{1 - \gamma}\, m_t

    Each average is computed in float32, or the weight's dtype where that is wider, and rounded
    once. A parameter without a direction, as one that is frozen, is its own average. It needs
    neither the model's class nor its devices, and the memory of about one copy of the weights.

    What is written depends on the source:

    * a ``.ckpt`` file or a distributed folder of Lightning: a ``.ckpt`` with ``state_dict`` and the
      hyper-parameters, for ``load_from_checkpoint``;
    * a ``lit_model.pth`` of LitGPT, or another file with ``model`` and ``optimizer``: a file with
      ``model``; the configuration and tokenizer files beside a ``lit_model.pth`` are copied along;
    * a file or a distributed folder of a loop of your own: a plain ``state_dict``.

    Args:
        source: A checkpoint made with EMA-Nesterov, a file or a folder.
        target: File to write. Its folder is made.
        share: Share :math:`s` of the way from the iterate to the average, in [0, 1].

    Raises:
        FileExistsError: If ``target`` exists.
        FileNotFoundError: If ``source`` does not exist.
        ValueError: If ``share`` is out of its range, if ``source`` is no whole checkpoint, or was
            made without EMA-Nesterov. Nothing is written then.
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
    if "optimizer_states" in checkpoint:  # of Lightning
        weights = checkpoint["state_dict"]
        averaged = _average(weights, weights.__getitem__, directions, share)
        return {"state_dict": averaged, **_kept_of_lightning(checkpoint)}
    weights = checkpoint.get("model", None)
    if isinstance(weights, Mapping):
        return {"model": _average(weights, weights.__getitem__, directions, share)}
    weights = _find_weights(checkpoint)
    return _average(weights, weights.__getitem__, directions, share)


def _find_weights(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    mappings = [value for value in checkpoint.values() if isinstance(value, Mapping) and value]
    for mapping in mappings:
        if all(isinstance(tensor, Tensor) for tensor in mapping.values()):
            return mapping
    raise ValueError(
        "source must hold the weights beside the optimizer, as a mapping of names to tensors, and "
        f"has only {', '.join(checkpoint)}."
    )


def _of_folder(source: Path, share: float) -> dict[str, Any]:
    if not is_folder(source):
        raise ValueError(
            f"source must be a file, or a folder of a distributed checkpoint, and {source} has no "
            ".metadata: it may be incomplete."
        )
    directions = directions_in_folder(source)
    entries = FileSystemReader(source).read_metadata().state_dict_metadata
    prefix = _prefix_of_weights(list(entries), directions)
    names: dict[str, str] = {}
    shapes: dict[str, Tensor] = {}
    for key, entry in entries.items():
        is_weight = key.startswith(prefix) and not _is_of_optimizer(key)
        if is_weight and isinstance(entry, TensorStorageMetadata):
            names[key.removeprefix(prefix)] = key
            shapes[key.removeprefix(prefix)] = torch.empty(entry.size, device="meta")

    def read(name: str) -> Tensor:
        tensor: Tensor = load_entries(source, [names[name]])[names[name]]
        return tensor

    averaged = _average(shapes, read, directions, share)
    meta = source / "meta.pt"
    if not meta.is_file():
        return averaged
    kept = _kept_of_lightning(torch.load(meta, map_location="cpu", weights_only=False))
    return {"state_dict": averaged, **kept}


def _is_of_optimizer(key: str) -> bool:
    return ".state." in f".{key}" or ".param_groups." in f".{key}"


def _prefix_of_weights(keys: list[str], directions: SavedDirections) -> str:
    name = directions.names()[0]
    for key in keys:
        if not _is_of_optimizer(key) and f".{plain_name(key)}".endswith(f".{name}"):
            return key.removesuffix(name) if key.endswith(name) else f"{key.partition('.')[0]}."
    raise ValueError(f"source must hold the weight {name!r} beside its direction, and does not.")


def _average(
    weights: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    directions: SavedDirections,
    share: float,
) -> dict[str, Tensor]:
    """Return the averages of all weights; those of tied ones once.

    Args:
        weights: Names, and tensors of their shapes.
        read: Returns a weight.
        directions: The directions, by plain names.
        share: Share of the way from the iterate to the average.
    """
    named = {plain_name(name): name for name in weights}
    missing = [name for name in directions.names() if name not in named]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(directions.names())} directions have no weight in the "
            f"checkpoint (first: {missing[0]!r})."
        )
    made: dict[str, Tensor] = {}
    moved: dict[torch.Size, list[tuple[str, Tensor]]] = {}
    progress = tqdm(directions.names(), desc="Averaging", delay=_SECONDS_WITHOUT_PROGRESS)
    for plain in progress:
        name = named[plain]
        x = read(name)
        offset = directions.offset(plain)
        made[name] = (x.to(offset.dtype) - share * offset).to(x.dtype)
        moved.setdefault(x.shape, []).append((name, x))
    for name, like in weights.items():
        if name not in made:
            x = read(name)
            # A tied weight has one direction, under the first of its names.
            twins = (twin for twin, value in moved.get(like.shape, []) if torch.equal(value, x))
            twin = next(twins, None)
            made[name] = x.clone() if twin is None else made[twin]
    return {name: made[name] for name in weights}


def _kept_of_lightning(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in checkpoint.items()
        if key in _KEPT_OF_LIGHTNING or "hyper_parameters" in key or key.startswith("hparams")
    }


def _copy_neighbours(source: Path, target: Path) -> None:
    for pattern in ("*.yaml", "*.json", "tokenizer*"):
        for path in source.glob(pattern):
            if path.is_file() and not (target / path.name).exists():
                shutil.copy(path, target / path.name)
