r"""The current step size :math:`\beta_t` over time: warmup, rest and learning-rate coupling."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LookaheadSchedule"]


@dataclass(frozen=True)
class LookaheadSchedule:
    r"""Current step size :math:`\beta_t` for each optimizer step.

    .. math::

        \beta_t = \begin{cases}
            \beta\, \eta_t / \max_r \eta_r & \text{warmup} \le t < \text{end} - \text{rest} \\
            0 & \text{otherwise}
        \end{cases}

    Args:
        lookahead_step_size: Peak :math:`\beta`, in (-1, 1). A steady base displacement ``u``
            becomes ``u / (1 - lookahead_step_size)``, so 1 and above diverge.
        warmup: First steps without lookahead. ``int``: optimizer steps, at least 0. ``float``:
            fraction of ``total_steps``, in [0, 1].
        rest: Last steps without lookahead, given like ``warmup``.
        total_steps: Optimizer steps of the whole run, at least 1. ``None``: the run has no known
            end; then ``warmup`` must be an ``int`` and ``rest`` must be 0.
        scale_with_lr: Whether :math:`\beta_t` follows the learning rate of the parameter group.

    Raises:
        ValueError: If ``warmup`` and ``rest`` together are longer than the run, or if one of them
            needs ``total_steps`` and there is none.

    Example:
        >>> schedule = LookaheadSchedule(0.5, warmup=10, rest=0.2, total_steps=100)
        >>> [schedule.step_size(step_idx) for step_idx in (9, 10, 79, 80)]
        [0.0, 0.5, 0.5, 0.0]
    """

    lookahead_step_size: float
    warmup: int | float = 0
    rest: int | float = 0
    total_steps: int | None = None
    scale_with_lr: bool = True

    def __post_init__(self) -> None:
        if self.total_steps is None:
            self._check_endless()
        elif self.warmup_steps + self.rest_steps > self.total_steps:
            raise ValueError(
                "warmup + rest must not be longer than the run, got "
                f"{self.warmup_steps} + {self.rest_steps} steps in a run of {self.total_steps}. "
                "Shorten them, or give them as fractions of the run."
            )

    def _check_endless(self) -> None:
        for name, value in (("warmup", self.warmup), ("rest", self.rest)):
            if isinstance(value, float) and value:
                raise ValueError(
                    f"{name} = {value} is a fraction of the run, and this run has no known end. "
                    "Set the number of optimizer steps (max_steps or max_epochs of the Trainer, or "
                    f"total_steps), or give {name} in optimizer steps (an int)."
                )
        if self.rest:
            raise ValueError(
                f"rest = {self.rest} counts from the end of the run, which has no known end. "
                "Set the number of optimizer steps (max_steps or max_epochs of the Trainer, or "
                "total_steps), or rest=0."
            )

    @property
    def warmup_steps(self) -> int:
        """First steps without lookahead. Unit: optimizer steps."""
        return self._in_steps(self.warmup)

    @property
    def rest_steps(self) -> int:
        """Last steps without lookahead. Unit: optimizer steps."""
        steps = self._in_steps(self.rest)
        is_share = isinstance(self.warmup, float) and isinstance(self.rest, float)
        if is_share and self.warmup + self.rest <= 1:  # both may have been rounded up
            steps = min(steps, (self.total_steps or 0) - self.warmup_steps)
        return steps

    def _in_steps(self, duration: int | float) -> int:
        if isinstance(duration, int):
            return duration
        return round(duration * (self.total_steps or 0))

    @property
    def has_active_steps(self) -> bool:
        """Whether any step of the run lies after the warmup and before the rest."""
        return self.total_steps is None or self.warmup_steps + self.rest_steps < self.total_steps

    def is_active(self, step_idx: int) -> bool:
        """Return whether the step lies after the warmup and before the rest.

        Args:
            step_idx: Optimizer steps taken before this one, at least 0.
        """
        if self.rest_steps and step_idx >= (self.total_steps or 0) - self.rest_steps:
            return False
        return step_idx >= self.warmup_steps

    def step_size(
        self, step_idx: int, lr_ratio: float = 1.0, *, peak: float | None = None
    ) -> float:
        r"""Return the current step size :math:`\beta_t`.

        Args:
            step_idx: Optimizer steps taken before this one, at least 0.
            lr_ratio: Learning rate over its maximum, in [0, 1].
            peak: Peak of the parameter group, in (-1, 1); ``None``: ``lookahead_step_size``.

        Returns:
            A number from 0 to the peak.
        """
        if not self.is_active(step_idx):
            return 0.0
        peak = self.lookahead_step_size if peak is None else peak
        return peak * (lr_ratio if self.scale_with_lr else 1.0)
