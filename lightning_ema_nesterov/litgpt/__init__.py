"""What a LitGPT YAML names: optimizers by ``optimizer.class_path``, text by ``data.class_path``."""

from lightning_ema_nesterov.litgpt.data import StdlibBytes, TextBytes, TokenShards
from lightning_ema_nesterov.litgpt.factory import ema_nesterov
from lightning_ema_nesterov.litgpt.roles import by_role
from lightning_ema_nesterov.litgpt.schedule import warmup_stable_decay

__all__ = [
    "StdlibBytes",
    "TextBytes",
    "TokenShards",
    "by_role",
    "ema_nesterov",
    "warmup_stable_decay",
]
