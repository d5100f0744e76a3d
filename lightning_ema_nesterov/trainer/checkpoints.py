"""Distributed checkpoints, which are folders: what one lacks, and how one replaces another."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import Strategy
from torch.distributed.checkpoint.filesystem import FileSystemReader

from lightning_ema_nesterov.trainer.questions import replace_method

__all__ = ["keys_of_distributed_checkpoint", "replace_as_a_whole"]


def keys_of_distributed_checkpoint(path: str | Path) -> list[str] | None:
    """Return the names of the entries of a folder of torch.distributed.checkpoint.

    Args:
        path: Path of a checkpoint of any kind, local or not.

    Returns:
        The names, or ``None`` for a checkpoint of another kind.
    """
    if not (Path(path) / ".metadata").is_file():
        return None
    return list(FileSystemReader(path).read_metadata().state_dict_metadata)


def replace_as_a_whole(strategy: Strategy) -> Callable[[], None]:
    """Have a strategy write a folder aside where it would write into a former checkpoint.

    Lightning writes into the former one. Where a process dies or a disk is full in between, shards
    of two steps are left there, and they load without an error.

    Args:
        strategy: The Trainer's strategy; its ``save_checkpoint`` is replaced.

    Returns:
        A function that undoes it.
    """
    save_checkpoint = strategy.save_checkpoint

    def save_aside(checkpoint: dict[str, Any], filepath: str | Path, **kwargs: Any) -> None:
        writes_folder = getattr(strategy, "_save_distributed_checkpoint", False)  # FSDP2
        if not writes_folder and getattr(strategy, "_state_dict_type", "full") != "sharded":
            return save_checkpoint(checkpoint, filepath, **kwargs)
        path, is_there = strategy.broadcast((Path(filepath).resolve(), Path(filepath).is_dir()))
        if not is_there:
            return save_checkpoint(checkpoint, path, **kwargs)
        aside = path.with_name(f"{path.name}.incomplete")
        if strategy.is_global_zero:
            shutil.rmtree(aside, ignore_errors=True)
        strategy.barrier("EMANesterov.save_checkpoint")
        save_checkpoint(checkpoint, aside, **kwargs)
        if strategy.is_global_zero:  # the last process to write
            _replace(path, aside)
        return None

    return replace_method(strategy, "save_checkpoint", save_aside)


def _replace(path: Path, complete: Path) -> None:
    """Put a complete checkpoint where a former one is; what else is in that folder stays in it."""
    former = path.with_name(f"{path.name}.former")
    path.rename(former)
    complete.rename(path)
    for entry in former.iterdir():
        if entry.suffix != ".distcp" and not (path / entry.name).exists():
            entry.rename(path / entry.name)
    shutil.rmtree(former)
