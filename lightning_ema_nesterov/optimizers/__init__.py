"""Base optimizers with little state that no well-kept library has, on torch alone."""

from lightning_ema_nesterov.optimizers.apollo import APOLLO
from lightning_ema_nesterov.optimizers.clipped_sgd import ClippedSGD
from lightning_ema_nesterov.optimizers.fira import Fira
from lightning_ema_nesterov.optimizers.galore import GaLore
from lightning_ema_nesterov.optimizers.lora_pre import LoRAPre
from lightning_ema_nesterov.optimizers.roles import groups_by_role
from lightning_ema_nesterov.optimizers.scale import SCALE

__all__ = ["APOLLO", "SCALE", "ClippedSGD", "Fira", "GaLore", "LoRAPre", "groups_by_role"]
