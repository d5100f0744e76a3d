"""Windows of text for a study: bytes of Python's standard library or of the user's text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_ema_nesterov.litgpt.data.corpus import load_corpus
from lightning_ema_nesterov.litgpt.data.windows import RandomWindows, Windows, evenly_spaced

__all__ = ["TextWindows"]


class TextWindows(LightningDataModule):
    """Random windows of bytes to train on, without an end; the same ones to validate on each time.

    The order follows from torch's global seed, and continues from a checkpoint.

    Args:
        text: A file, or a folder of text files. ``None``: the running Python's standard library.
        window_size: Inputs in a window. One byte more is returned: the last target.
        batch_size: Windows in a batch, at least 1.
        num_validation_windows: Windows to validate on, at most.
    """

    def __init__(
        self,
        text: str | None = None,
        *,
        window_size: int = 64,
        batch_size: int = 8,
        num_validation_windows: int = 512,
    ) -> None:
        super().__init__()
        self.text = None if text is None else Path(text)
        self.window_size = window_size
        self.batch_size = batch_size
        self.num_validation_windows = num_validation_windows
        self._num_batches = 0

    @property
    def tokens_per_batch(self) -> int:
        """Inputs in a batch, from which a study tells tokens per second."""
        return self.batch_size * self.window_size

    @override
    def setup(self, stage: str) -> None:
        """Read and split the text."""
        self.corpus = load_corpus(self.text, window_size=self.window_size)

    @override
    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return batches of shape ``(batch_size, window_size + 1)``."""
        windows = Windows([self.corpus.train.numpy()], self.window_size)
        num_taken = self._num_batches * self.batch_size
        order = RandomWindows(windows, seed=torch.initial_seed(), num_taken=num_taken)
        return DataLoader(windows, batch_size=self.batch_size, sampler=order)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return where in the order training is; between two optimizer steps."""
        if self.trainer is None:
            return {}
        num_batches = self.trainer.global_step * self.trainer.accumulate_grad_batches
        return {"num_batches": num_batches}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where a checkpoint was made."""
        self._num_batches = state_dict.get("num_batches", 0)

    @override
    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return the batches to validate on."""
        held_out = evenly_spaced(
            self.corpus.validation,
            window_size=self.window_size,
            num_windows=self.num_validation_windows,
        )
        return DataLoader(held_out, batch_size=128)
