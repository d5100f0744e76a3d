"""Low-rank layers in a run of a study."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_ema_nesterov.low_rank import to_low_rank_

__all__ = ["ToLowRank"]


class ToLowRank(Callback):
    """Gives a model low-rank layers before its optimizer is made.

    Args:
        rank: Rank of each layer.
        alpha: Scale of each product, above 0.
    """

    def __init__(self, rank: int, alpha: float = 32.0) -> None:
        self.rank = rank
        self.alpha = alpha

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the layers."""
        if stage == "fit":
            to_low_rank_(pl_module, rank=self.rank, alpha=self.alpha)
