"""Experiments that the commands of ``ema-nesterov`` run."""
