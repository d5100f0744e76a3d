"""Windows of token ids in a shuffled order that a checkpoint can go on from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

__all__ = ["TokenArray", "WindowLoader", "fixed_windows"]

TokenArray = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


class _ShuffledWindows(IterableDataset[Tensor]):
    """Batches of one process, epoch after epoch: every window once, parts and windows shuffled.

    Attributes:
        epoch: Epochs that are over.
        position: Windows that all processes together took from this epoch.
    """

    def __init__(
        self, parts: Sequence[TokenArray], *, window_size: int, batch_size: int, seed: int
    ) -> None:
        self.parts = parts
        self.window_size = window_size
        self.batch_size = batch_size
        self.seed = seed
        self.counts = [_num_windows(part, window_size) for part in parts]
        self.epoch = 0
        self.position = 0
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    @override
    def __iter__(self) -> Iterator[Tensor]:
        rank, num_ranks = _rank()
        num_taken = self.batch_size * num_ranks
        while self.position + num_taken <= sum(self.counts):
            first = self.position + rank * self.batch_size
            batch = self._read(range(first, first + self.batch_size))
            self.position += num_taken
            yield batch
        self.epoch, self.position = self.epoch + 1, 0

    def _read(self, places: range) -> Tensor:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.parts))
        ends = np.cumsum(np.array(self.counts)[order])
        windows = []
        for place in places:
            turn = int(np.searchsorted(ends, place, side="right"))
            part = int(order[turn])
            shuffled = self._shuffled(self.epoch, part)
            idx = int(shuffled[place - int(ends[turn]) + self.counts[part]])
            windows.append(_window(self.parts[part], idx, self.window_size))
        return torch.stack(windows)

    def _shuffle(self, epoch: int, part: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch, part]).permutation(self.counts[part])


class WindowLoader(DataLoader[Tensor]):
    """Training batches whose order continues exactly from a checkpoint.

    Each process takes its own windows. On another number of processes training goes on with the
    windows that nobody took.

    Args:
        parts: Token ids, one array for each text or shard. Windows do not cross parts.
        window_size: Inputs in a window. One token more is returned: the last target.
        batch_size: Windows of one process in a batch.
        seed: Seed of the order, at least 0.

    Raises:
        ValueError: If the parts hold less than one batch for all processes.
    """

    dataset: _ShuffledWindows

    def __init__(
        self, parts: Sequence[TokenArray], *, window_size: int, batch_size: int, seed: int
    ) -> None:
        dataset = _ShuffledWindows(parts, window_size=window_size, batch_size=batch_size, seed=seed)
        wanted = batch_size * _rank()[1]
        if sum(dataset.counts) < wanted:
            raise ValueError(
                f"data: the training text must hold {wanted} windows of {window_size} tokens, one "
                f"batch of all devices, and holds {sum(dataset.counts)}. Give more text, or set "
                "train.micro_batch_size or train.max_seq_length lower."
            )
        super().__init__(dataset, batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        """Return where in the text training is."""
        return {
            "epoch": self.dataset.epoch,
            "position": self.dataset.position,
            "of": self._identity(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where a checkpoint was made.

        Raises:
            ValueError: If that was another text or another order.
        """
        if state_dict["of"] != self._identity():
            raise ValueError(
                f"The checkpoint was made with the text {state_dict['of']}, and this run has "
                f"{self._identity()}. Give the same data, seed and train.max_seq_length, or start "
                "a new run with initial_checkpoint_dir."
            )
        self.dataset.epoch = state_dict["epoch"]
        self.dataset.position = state_dict["position"]

    def _identity(self) -> dict[str, int]:
        return {
            "num_tokens": sum(map(len, self.dataset.parts)),
            "num_parts": len(self.dataset.parts),
            "window_size": self.dataset.window_size,
            "seed": self.dataset.seed,
        }


def fixed_windows(
    parts: Sequence[TokenArray], *, window_size: int, batch_size: int
) -> DataLoader[Tensor]:
    """Return validation batches: the same windows in the same order for every process and run.

    The order is random, so that the first batches are a sample of the whole. The last batch is left
    out if it is not full, unless it is the only one.

    Raises:
        ValueError: If the parts do not hold one window.
    """
    dataset = _FixedWindows(parts, window_size=window_size, batch_size=batch_size)
    if not len(dataset.order):
        raise ValueError(
            f"data: the validation text must hold one window of {window_size} tokens, and does "
            "not. Give more text, or set train.max_seq_length lower."
        )
    return DataLoader(dataset, batch_size=None)


class _FixedWindows(IterableDataset[Tensor]):
    """Batches of all windows, always in the same random order."""

    def __init__(self, parts: Sequence[TokenArray], *, window_size: int, batch_size: int) -> None:
        self.parts = parts
        self.window_size = window_size
        self.batch_size = batch_size
        counts = [_num_windows(part, window_size) for part in parts]
        self.starts = np.cumsum([0, *counts])
        self.order = np.random.default_rng(0).permutation(sum(counts))

    @override
    def __iter__(self) -> Iterator[Tensor]:
        num_batches = max(1, len(self.order) // self.batch_size)
        for first in range(0, num_batches * self.batch_size, self.batch_size):
            places = self.order[first : first + self.batch_size]
            yield torch.stack([self._read(int(place)) for place in places])

    def _read(self, place: int) -> Tensor:
        part = int(np.searchsorted(self.starts, place, side="right")) - 1
        return _window(self.parts[part], place - int(self.starts[part]), self.window_size)


def _num_windows(part: TokenArray, window_size: int) -> int:
    return max(0, len(part) - 1) // window_size


def _window(part: TokenArray, idx: int, window_size: int) -> Tensor:
    start = idx * window_size
    return torch.from_numpy(part[start : start + window_size + 1].astype(np.int64))


def _rank() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
