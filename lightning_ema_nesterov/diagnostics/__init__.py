"""Callbacks that show what EMA-Nesterov relies on, during any run of the Trainer."""

from lightning_ema_nesterov.diagnostics.loss_along_direction import LossAlongDirection
from lightning_ema_nesterov.diagnostics.loss_at_average import LossAtAverage
from lightning_ema_nesterov.diagnostics.trajectory_spectrum import TrajectorySpectrum

__all__ = ["LossAlongDirection", "LossAtAverage", "TrajectorySpectrum"]
