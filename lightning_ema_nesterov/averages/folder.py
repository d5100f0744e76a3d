"""A folder of torch.distributed.checkpoint, read by one process, an entry at a time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

__all__ = ["Folder"]

_OF_GROUPS = re.compile(r"((?:[^.]+\.)*?)param_groups\.")


class Folder:
    """A folder of torch.distributed.checkpoint.

    Args:
        path: The folder.

    Attributes:
        path: The folder.
        entries: What is saved about each entry, by its key.
        optimizers: What the keys of each optimizer's entries begin with.

    Raises:
        ValueError: If the folder is no such checkpoint, or an incomplete one.
    """

    def __init__(self, path: Path) -> None:
        if not self.is_at(path):
            raise ValueError(
                "source must be a file, or a folder of a distributed checkpoint, and "
                f"{path} has no .metadata: it may be incomplete."
            )
        self.path = path
        self._reader = _Reader(path)
        try:
            self.entries = self._reader.read_metadata().state_dict_metadata
        except Exception as error:  # pickle has many for a file that is cut off
            raise self._incomplete(error) from error
        found = (_OF_GROUPS.match(key) for key in self.entries)
        self.optimizers = list(dict.fromkeys(match[1] for match in found if match))

    @staticmethod
    def is_at(path: Path) -> bool:
        """Return whether a path is a folder of torch.distributed.checkpoint."""
        return (path / ".metadata").is_file()

    def is_of_optimizer(self, key: str) -> bool:
        """Return whether an entry belongs to an optimizer."""
        parts = tuple(f"{start}{part}" for start in self.optimizers for part in _OPTIMIZER_PARTS)
        return key.startswith(parts)

    def load(self, keys: list[str]) -> dict[str, Any]:
        """Load entries, whole.

        Raises:
            ValueError: If files are missing, or cut off.
        """
        state_dict: dict[str, Any] = {}
        for key in keys:
            entry = self.entries[key]
            if isinstance(entry, TensorStorageMetadata):
                state_dict[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
            else:
                state_dict[key] = None
        try:
            load(state_dict, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:  # which is not an Exception
            causes = [cause for cause, _ in error.failures.values()]
            raise self._incomplete(causes[0] if causes else error) from error
        except Exception as error:
            raise self._incomplete(error) from error
        return state_dict

    def _incomplete(self, error: BaseException) -> ValueError:
        said = str(error).strip().splitlines() or [type(error).__name__]
        return ValueError(
            f"source must be a whole checkpoint, and {self.path} cannot be read: {said[0]}"
        )


_OPTIMIZER_PARTS = ("state.", "param_groups.")


class _Reader(FileSystemReader):
    """Reads what is saved about the entries once, and not with each of them."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata
