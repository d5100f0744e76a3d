"""What the quickstart trains, written without the study's machinery: an oracle for it."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Subset

from lightning_ema_nesterov.experiments.model import ByteDecoder
from lightning_ema_nesterov.litgpt.data.windows import RandomWindows, Windows
from lightning_ema_nesterov.optimizers.lr_schedule import WarmupStableDecay


class ByteLanguageModel(ByteDecoder):
    """The quickstart's decoder with an AdamW and a schedule of its own.

    The learning rate warms up over 5 % of ``num_steps`` optimizer steps, is constant, and falls
    linearly to zero over the last 30 %.
    """

    def __init__(self, lr: float, num_steps: int, **shape: int) -> None:
        super().__init__(**shape)
        self.lr = lr
        self.num_steps = num_steps

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=0.1
        )
        schedule = WarmupStableDecay.of_fractions(self.num_steps, warmup=0.05, decay=0.3)
        scheduler = LambdaLR(optimizer, lambda step_idx: schedule.lr_at(step_idx))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def shuffled(data: Tensor, *, window_size: int, num_windows: int, seed: int) -> Subset[Tensor]:
    """Return the first random windows of a text, ``uint8`` of shape ``(num_bytes,)``."""
    windows = Windows([data.numpy()], window_size)
    return Subset(windows, list(islice(RandomWindows(windows, seed=seed), num_windows)))
