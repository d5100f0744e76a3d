"""Scalars that belong to no hook in which Lightning lets a callback log."""

from __future__ import annotations

from lightning.pytorch import Trainer

__all__ = ["log_to_all"]


def log_to_all(trainer: Trainer, scalars: dict[str, float]) -> None:
    """Log scalars with every logger, at the step that was taken last."""
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=max(0, trainer.global_step - 1))
