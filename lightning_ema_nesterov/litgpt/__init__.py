"""What a LitGPT YAML names: optimizers by ``optimizer.class_path``, text by ``data.class_path``."""

from lightning_ema_nesterov.litgpt.data.bytes import StdlibBytes, TextBytes
from lightning_ema_nesterov.litgpt.data.shards import TokenShards
from lightning_ema_nesterov.litgpt.factory import ema_nesterov
from lightning_ema_nesterov.litgpt.low_rank_models import low_rank, momentum_reset
from lightning_ema_nesterov.litgpt.lr_schedule import warmup_stable_decay
from lightning_ema_nesterov.litgpt.roles import by_role

__all__ = [
    "StdlibBytes",
    "TextBytes",
    "TokenShards",
    "by_role",
    "ema_nesterov",
    "low_rank",
    "momentum_reset",
    "warmup_stable_decay",
]
