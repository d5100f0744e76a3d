"""A learning rate that rises linearly, is constant, and falls at the end of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["WarmupStableDecay"]


@dataclass(frozen=True)
class WarmupStableDecay:
    r"""Learning rate over the optimizer steps: linear warm-up, constant, final decay.

    .. math::

        \eta_t = \begin{cases}
            \eta\,(t + 1) / \text{warmup} & t < \text{warmup} \\
            \eta_\text{min} + (\eta - \eta_\text{min})\, s & \text{linear} \\
            \eta\,(\eta_\text{min} / \eta)^{1 - s} & \text{exponential}
        \end{cases}
        \qquad s = \min(1, (\text{total} - t) / \text{decay})

    Args:
        lr: Peak :math:`\eta`, above 0.
        min_lr: Learning rate :math:`\eta_\text{min}` at the end of the run, in [0, ``lr``]; above 0
            for an exponential decay.
        warmup_steps: Optimizer steps of the warm-up, at least 0.
        decay_steps: Optimizer steps of the decay, at least 0. The first of them is still at the
            peak, and so may be the last one of the warm-up.
        total_steps: Optimizer steps of the run, at least ``warmup_steps + decay_steps - 1``.
        shape: Of the decay.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> schedule = WarmupStableDecay(1.0, 0.0, warmup_steps=2, decay_steps=4, total_steps=10)
        >>> [schedule.lr_at(step_idx) for step_idx in (0, 1, 5, 6, 8, 9)]
        [0.5, 1.0, 1.0, 1.0, 0.5, 0.25]
    """

    lr: float
    min_lr: float
    warmup_steps: int
    decay_steps: int
    total_steps: int
    shape: Literal["linear", "exponential"] = "linear"

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}.")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr must be in [0, {self.lr}], up to lr, got {self.min_lr}.")
        if self.shape not in ("linear", "exponential"):
            raise ValueError(f"shape must be linear or exponential, got {self.shape!r}.")
        if self.shape == "exponential" and not self.min_lr:
            raise ValueError("min_lr must be above 0 for an exponential decay, got 0.")
        if min(self.warmup_steps, self.decay_steps) < 0:
            raise ValueError(
                "warmup_steps and decay_steps must be at least 0, got "
                f"{self.warmup_steps} and {self.decay_steps}."
            )
        if self.warmup_steps + self.decay_steps > self.total_steps + 1:
            raise ValueError(
                "warmup_steps + decay_steps must not be longer than the run, got "
                f"{self.warmup_steps} + {self.decay_steps} steps of {self.total_steps}."
            )

    @classmethod
    def of_fractions(cls, total_steps: int, *, warmup: float, decay: float) -> WarmupStableDecay:
        """Return the schedule of a learning rate over its peak, linearly up and down to 0.

        Args:
            total_steps: Optimizer steps of the run.
            warmup: Fraction of the run in which it rises, in [0, 1].
            decay: Fraction of the run in which it falls, in [0, 1 - ``warmup``].

        Raises:
            ValueError: If warm-up and decay together are longer than the run.

        Example:
            >>> schedule = WarmupStableDecay.of_fractions(100, warmup=0.05, decay=0.3)
            >>> [schedule.lr_at(step_idx) for step_idx in (0, 4, 50, 85, 100)]
            [0.2, 1.0, 1.0, 0.5, 0.0]
        """
        return cls(
            lr=1.0,
            min_lr=0.0,
            warmup_steps=round(warmup * total_steps),
            decay_steps=round(decay * total_steps),
            total_steps=total_steps,
        )

    def lr_at(self, step_idx: int) -> float:
        """Return the learning rate of a step.

        Args:
            step_idx: Optimizer steps taken before this one, in [0, ``total_steps``].
        """
        if step_idx < self.warmup_steps:
            return self.lr * (step_idx + 1) / self.warmup_steps
        left = self.total_steps - step_idx
        if left >= self.decay_steps:
            return self.lr
        if self.shape == "exponential":
            return float(self.lr * (self.min_lr / self.lr) ** (1.0 - left / self.decay_steps))
        return self.min_lr + (self.lr - self.min_lr) * left / self.decay_steps
