"""The loss at the average of the weights, beside that at the last weights, from one run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightning_ema_nesterov.diagnostics.loss_along_direction import LossAlongDirection
from lightning_ema_nesterov.experiments.event_files import Point, read_scalars
from lightning_ema_nesterov.experiments.study.results import Result

__all__ = ["AVERAGE", "at_average", "average_watch", "in_words"]

AVERAGE = "average of its weights"


def average_watch(ema_decay: float, num_batches: int) -> list[LossAlongDirection]:
    """Return the callback that measures the loss at the average; none where there is no average.

    Args:
        ema_decay: That of the run's EMANesterov, in [0, 1).
        num_batches: Batches of a validation.
    """
    if not ema_decay:
        return []
    return [LossAlongDirection(distances=(_distance(ema_decay),), num_batches=num_batches)]


def at_average(result: Result, log_dir: Path, ema_decay: float) -> Result | None:
    """Return the losses that a run would have had at the average, ``None`` if it has none.

    Args:
        result: The run's own, at its iterates.
        log_dir: Folder of its event file.
        ema_decay: As for :func:`average_watch`.
    """
    found = read_scalars(log_dir).get(f"ema_nesterov/loss_along/a={_distance(ema_decay):g}", [])
    gaps = {point.step: point.value for point in found}
    losses = [
        Point(point.step, point.seconds, point.value + gaps[point.step])
        for point in result.val_loss
        if point.step in gaps
    ]
    run = replace(result.run, method=AVERAGE)
    return replace(result, run=run, val_loss=losses, lookahead_steps=None) if losses else None


def in_words(result: Result, average: Result, last_flat_step: int) -> str:
    """Say what both losses are where the learning rate begins to fall.

    Args:
        result: The losses at the iterates.
        average: Those at the average.
        last_flat_step: Steps before the learning rate falls.
    """
    before = [point for point in average.val_loss if point.step <= last_flat_step]
    if not before:
        return ""
    step, _, loss = before[-1]
    [at_x] = [point.value for point in result.val_loss if point.step == step]
    return (
        f"At step {step:,}, before the learning rate falls, its loss is {at_x:.4f} at the weights "
        f"and {loss:.4f} at their average."
    )


def _distance(ema_decay: float) -> float:
    # x - gamma / (1 - gamma) m is the average.
    return -ema_decay / (1.0 - ema_decay)
