"""Windows of token ids, and the orders in which they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, count
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, Subset
from typing_extensions import override

__all__ = [
    "RandomWindows",
    "ShuffledWindows",
    "TokenArray",
    "WindowLoader",
    "Windows",
    "evenly_spaced",
    "fixed_windows",
]

TokenArray = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
"""Token ids, of shape ``(num_tokens,)``."""


class Windows(Dataset[Tensor]):
    """Windows of consecutive tokens: one for every token that a whole window can start at.

    They are numbered by their first tokens, part after part. None crosses from one part to the
    next.

    Args:
        parts: Token ids, one array for each text or shard.
        window_size: Inputs in a window, at least 1. One token more is returned: the last target.

    Example:
        >>> windows = Windows([np.arange(4, dtype=np.uint8), np.arange(7, 10, dtype=np.uint8)], 2)
        >>> [window.tolist() for window in windows]
        [[0, 1, 2], [1, 2, 3], [7, 8, 9]]
    """

    def __init__(self, parts: Sequence[TokenArray], window_size: int) -> None:
        self.parts = parts
        self.window_size = window_size
        self._ends = np.cumsum([max(0, len(part) - window_size) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @override
    def __getitem__(self, idx: int) -> Tensor:
        """Return a window, ``int64`` of shape ``(window_size + 1,)``."""
        if not 0 <= idx < len(self):
            raise IndexError(f"The number of a window must be in [0, {len(self)}), got {idx}.")
        part = int(np.searchsorted(self._ends, idx, side="right"))
        start = idx - self._first(part)
        tokens = self.parts[part][start : start + self.window_size + 1]
        return torch.from_numpy(tokens.astype(np.int64))

    def side_by_side(self, part: int) -> range:
        """Return the numbers of a part's windows that do not overlap, from its first token on."""
        return range(self._first(part), int(self._ends[part]), self.window_size)

    def _first(self, part: int) -> int:
        return int(self._ends[part - 1]) if part else 0


class RandomWindows(Sampler[int]):
    """Uniformly random windows without an end, drawn with replacement.

    Args:
        windows: What to draw from.
        seed: Seed of the order, the same in every pass.
        num_taken: First windows of the order to leave out.
    """

    def __init__(self, windows: Windows, *, seed: int, num_taken: int = 0) -> None:
        self.num_windows = len(windows)
        self.seed = seed
        self.num_taken = num_taken

    @override
    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        for idx in count():
            window = int(torch.randint(self.num_windows, (), generator=generator))
            if idx >= self.num_taken:
                yield window


def evenly_spaced(data: Tensor, *, window_size: int, num_windows: int) -> Subset[Tensor]:
    """Return windows that do not overlap, spread over the whole text.

    Args:
        data: Bytes, ``uint8`` of shape ``(num_bytes,)``.
        window_size: Inputs in a window.
        num_windows: Windows to return, at most.
    """
    windows = Windows([data.numpy()], window_size)
    last = len(windows) - 1
    num_windows = min(num_windows, 1 + last // window_size)
    return Subset(windows, torch.linspace(0, last, num_windows).long().tolist())


def fixed_windows(
    parts: Sequence[TokenArray], *, window_size: int, batch_size: int
) -> DataLoader[Tensor]:
    """Return validation batches: the same windows in the same order for every process and run.

    The order is random, so that the first batches are a sample of the whole. The last batch is left
    out if it is not full, unless it is the only one.

    Raises:
        ValueError: If the parts do not hold one window.
    """
    windows = Windows(parts, window_size)
    if not len(windows):
        raise ValueError(
            f"data: the validation text must hold one window of {window_size} tokens, and does "
            "not. Give more text, or set train.max_seq_length lower."
        )
    numbers = list(chain.from_iterable(map(windows.side_by_side, range(len(parts)))))
    num_taken = max(1, len(numbers) // batch_size) * batch_size
    order = np.random.default_rng(0).permutation(numbers)[:num_taken]
    held_out = Subset(windows, order.tolist())
    # Fabric would give each process a part of the windows, unless a sampler of this class is there.
    whole: Sampler[int] = DistributedSampler(held_out, num_replicas=1, rank=0, shuffle=False)
    return DataLoader(held_out, batch_size=batch_size, sampler=whole)


class ShuffledWindows(DistributedSampler[int]):
    """Windows of one process that do not overlap, in every epoch each once and shuffled anew.

    Parts follow each other in a random order, and so do the windows within a part.
    Fabric puts no sampler of its own into the place of one of this class.

    Args:
        windows: What to read.
        batch_size: Windows of one process in a batch. All processes together take whole batches.
        seed: Seed of the order, at least 0.

    Attributes:
        epoch: Epochs that are over.
        position: Windows that all processes together took from this epoch.
        num_windows: Windows in an epoch.
    """

    def __init__(self, windows: Windows, *, batch_size: int, seed: int) -> None:
        rank, num_ranks = _rank()
        super().__init__(windows, num_replicas=num_ranks, rank=rank, seed=seed)
        self.batch_size = batch_size
        self.position = 0
        self._numbers = [windows.side_by_side(part) for part in range(len(windows.parts))]
        self.num_windows = sum(map(len, self._numbers))
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    @override
    def __len__(self) -> int:
        return self.num_windows // self.num_taken * self.batch_size

    @property
    def num_taken(self) -> int:
        """Windows that all processes together take at once."""
        return self.batch_size * self.num_replicas

    @override
    def __iter__(self) -> Iterator[int]:
        while self.position + self.num_taken <= self.num_windows:
            first = self.position + self.rank * self.batch_size
            # A checkpoint is made when the batch was read, of which this is the beginning.
            self.position += self.num_taken
            yield from self._read(range(first, first + self.batch_size))
        self.epoch, self.position = self.epoch + 1, 0

    @override
    def set_epoch(self, epoch: int) -> None:
        """Do nothing: Fabric counts epochs from the start of the process, not of the run."""

    def _read(self, places: range) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self._numbers))
        ends = np.cumsum([len(self._numbers[part]) for part in order])
        for place in places:
            turn = int(np.searchsorted(ends, place, side="right"))
            part = int(order[turn])
            numbers = self._numbers[part]
            yield numbers[self._shuffled(self.epoch, part)[place - int(ends[turn]) + len(numbers)]]

    def _shuffle(self, epoch: int, part: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch, part]).permutation(len(self._numbers[part]))


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

    def __init__(
        self, parts: Sequence[TokenArray], *, window_size: int, batch_size: int, seed: int
    ) -> None:
        windows = Windows(parts, window_size)
        order = ShuffledWindows(windows, batch_size=batch_size, seed=seed)
        if order.num_windows < order.num_taken:
            raise ValueError(
                f"data: the training text must hold {order.num_taken} windows of {window_size} "
                f"tokens, one batch of all devices, and holds {order.num_windows}. Give more text, "
                "or set train.micro_batch_size or train.max_seq_length lower."
            )
        super().__init__(windows, batch_size=batch_size, sampler=order)
        self._order = order
        self._identity = {
            "num_tokens": sum(map(len, parts)),
            "num_parts": len(parts),
            "window_size": window_size,
            "seed": seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return where in the text training is."""
        return {
            "epoch": self._order.epoch,
            "position": self._order.position,
            "of": dict(self._identity),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where a checkpoint was made.

        Raises:
            ValueError: If that was another text or another order.
        """
        if state_dict["of"] != self._identity:
            raise ValueError(
                f"The checkpoint was made with the text {state_dict['of']}, and this run has "
                f"{self._identity}. Give the same data, seed and train.max_seq_length, or start "
                "a new run with initial_checkpoint_dir."
            )
        self._order.epoch = state_dict["epoch"]
        self._order.position = state_dict["position"]


def _rank() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
