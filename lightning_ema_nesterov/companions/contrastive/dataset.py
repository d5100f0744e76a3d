"""A data set that says which sample it gives."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset, IterableDataset
from typing_extensions import override

__all__ = ["WithIndex", "check_indexed"]


class WithIndex(Dataset[tuple[Any, int]]):
    """Items of a data set with their index, as ``(item, index)``.

    Args:
        dataset: With a length, and items by index.

    Raises:
        TypeError: If it has no length or is read in its own order.

    Example:
        >>> WithIndex(["a", "b"])[1]
        ('b', 1)
    """

    def __init__(self, dataset: Any) -> None:
        _check_map_style(dataset)
        self.dataset = dataset

    @override
    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index], int(index)

    def __len__(self) -> int:
        return len(self.dataset)


def check_indexed(dataset: Any, num_samples: int) -> None:
    """Raise unless items end in their index, which is below ``num_samples``. Reads two items.

    Raises:
        TypeError: If there is no length, no item by index, or no index in an item.
        ValueError: If there are more samples than ``num_samples``, or none.
    """
    _check_map_style(dataset)
    length = len(dataset)
    if not 0 < length <= num_samples:
        raise ValueError(
            f"dataset must have between 1 and num_samples={num_samples} samples, got {length}: "
            "each sample has its chain. Pass num_samples=len(dataset)."
        )
    for index in (0, length - 1):
        item = dataset[index]
        last = item[-1] if isinstance(item, (tuple, list)) and item else item
        if not _is_number(last, index):
            got = repr(last) if isinstance(last, (int, float, str)) else type(last).__name__
            raise TypeError(
                f"dataset[{index}] must end in its index, {index}, got {got}: a chain belongs to a "
                "sample. Wrap the data set in WithIndex."
            )


def _is_number(value: Any, index: int) -> bool:
    try:
        return not isinstance(value, (bool, float, str)) and int(value) == index
    except (TypeError, ValueError):
        return False


def _check_map_style(dataset: Any) -> None:
    is_readable = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset) or not is_readable:
        raise TypeError(
            f"dataset must have a length and items by index, got {type(dataset).__name__}: a chain "
            "belongs to a sample. Use a map-style data set."
        )
