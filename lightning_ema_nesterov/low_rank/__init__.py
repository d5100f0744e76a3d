"""Linear layers of low rank, and the restarts with which they are trained."""

from lightning_ema_nesterov.low_rank.callbacks import MomentumReset, WeightRefactorization
from lightning_ema_nesterov.low_rank.convert import to_dense_, to_low_rank_
from lightning_ema_nesterov.low_rank.layers import LowRankLinear
from lightning_ema_nesterov.low_rank.momentum_reset import attach_momentum_reset
from lightning_ema_nesterov.low_rank.refactorization import (
    attach_weight_refactorization,
    refactorize_,
)

__all__ = [
    "LowRankLinear",
    "MomentumReset",
    "WeightRefactorization",
    "attach_momentum_reset",
    "attach_weight_refactorization",
    "refactorize_",
    "to_dense_",
    "to_low_rank_",
]
