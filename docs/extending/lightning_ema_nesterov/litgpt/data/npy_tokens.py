"""Token ids in two NumPy files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from typing_extensions import override

from lightning_ema_nesterov.litgpt.data.base import WindowData
from lightning_ema_nesterov.litgpt.data.windows import TokenArray

__all__ = ["NpyTokens"]


@dataclass(kw_only=True)
class NpyTokens(WindowData):
    """Token ids in two files of :func:`numpy.save`.

    Args:
        train: File to train on: one dimension, ``uint8`` or ``uint16``.
        val: File to validate on.
        seed: Seed of the order of the windows, at least 0.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a file holds something else.
    """

    train: Path
    val: Path

    @override
    def setup(self, stage: str = "") -> None:
        """Map the two files into memory."""
        self.train_parts = [_open(self.train, "train")]
        self.val_parts = [_open(self.val, "val")]


def _open(path: Path, key: str) -> TokenArray:
    if not Path(path).exists():
        raise FileNotFoundError(f"data.init_args.{key}: there is no file {path}.")
    tokens: TokenArray = np.load(path, mmap_mode="r")
    if tokens.ndim != 1 or tokens.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"data.init_args.{key}: {path} must hold one dimension of uint8 or uint16, got "
            f"{tokens.dtype} of shape {tokens.shape}. Convert it with tokens.astype(np.uint16)."
        )
    return tokens
