"""The weight average that a checkpoint made with EMA-Nesterov holds, read out as weights."""

from lightning_ema_nesterov.averages.checkpoint import average_checkpoint

__all__ = ["average_checkpoint"]
