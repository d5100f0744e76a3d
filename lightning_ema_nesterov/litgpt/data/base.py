"""What the data modules for LitGPT share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_ema_nesterov.litgpt.data.windows import TokenArray, WindowLoader, fixed_windows

__all__ = ["WindowData"]


@dataclass(kw_only=True)
class WindowData(DataModule):  # type: ignore[misc]  # litgpt has no types
    """Windows of token ids, shuffled to train on and fixed to validate on.

    A data module is a child of this class that fills ``train_parts`` and ``val_parts`` in
    ``setup``, from files that it made in ``prepare_data`` if it has to make any. Its arguments are
    fields of the dataclass, which a YAML gives in ``data.init_args``.

    Args:
        seed: Seed of the order of the windows, at least 0.

    Attributes:
        batch_size: Windows in a micro-batch, from LitGPT.
        window_size: Inputs in a window, from LitGPT.
        train_parts: Token ids to train on, one array for each text or shard.
        val_parts: Token ids to validate on.
    """

    seed: int = 42
    batch_size: int = field(init=False, repr=False, default=1)
    window_size: int = field(init=False, repr=False, default=1)
    train_parts: Sequence[TokenArray] = field(init=False, repr=False, default=())
    val_parts: Sequence[TokenArray] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        super().__init__()

    @override
    def connect(
        self,
        tokenizer: Tokenizer | None = None,
        batch_size: int = 1,
        max_seq_length: int | None = None,
        **kwargs: object,
    ) -> None:
        """Take the size of a micro-batch and of a window from LitGPT."""
        self.batch_size = batch_size
        self.window_size = max_seq_length or 1

    @override
    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return shuffled batches that continue from a checkpoint."""
        return WindowLoader(
            self.train_parts,
            window_size=self.window_size,
            batch_size=self.batch_size,
            seed=self.seed,
        )

    @override
    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return batches that are the same in every evaluation."""
        return fixed_windows(
            self.val_parts, window_size=self.window_size, batch_size=self.batch_size
        )
