"""Restart an optimizer's moments and step counts every so often."""

from __future__ import annotations

from typing import Any

from torch.optim import Adagrad, Optimizer

from lightning_ema_nesterov.core.neighbours import bring_back, set_aside
from lightning_ema_nesterov.core.progress import set_rate_factor
from lightning_ema_nesterov.low_rank.step_counter import StepCounter, check_count

__all__ = ["MomentumResetHandle", "attach_momentum_reset", "check_reset", "recovery_factor"]

STEP_KEY = "momentum_reset_step"
"""Key of the steps taken, in the first parameter group."""

_LEAST_FACTOR = 1e-3


class MomentumResetHandle:
    """What :func:`attach_momentum_reset` returns: the way to end it."""

    def __init__(self, optimizer: Optimizer, every_n_steps: int, recovery_steps: int) -> None:
        self.optimizer = optimizer
        self.every_n_steps = every_n_steps
        self.recovery_steps = recovery_steps
        self._lrs: list[Any] = []
        self._counter = StepCounter(
            optimizer, STEP_KEY, before=self._before, after=self._after, cancel=self._cancel
        )
        self._counter.attach()
        self._load_handle = optimizer.register_load_state_dict_post_hook(self._after_load)
        self._tell(self._counter.num_steps)

    def start_at(self, num_steps: int) -> None:
        """Set how many steps the run took before, unless a checkpoint that was loaded tells."""
        self._counter.start_at(num_steps)
        self._tell(self._counter.num_steps)

    def detach(self) -> None:
        """Remove the hooks; no restart follows, and the learning rate is the optimizer's own."""
        self._counter.detach()
        self._load_handle.remove()
        set_rate_factor(self.optimizer, 1.0)

    def _factor(self, num_steps: int) -> float:
        since = num_steps % self.every_n_steps
        return recovery_factor(since, self.recovery_steps) if num_steps >= self.every_n_steps else 1

    def _tell(self, num_steps: int) -> None:
        set_rate_factor(self.optimizer, self._factor(num_steps))

    def _after_load(self, optimizer: Optimizer) -> None:
        self._tell(self._counter.num_steps)

    def _before(self, num_steps: int) -> None:
        if num_steps and num_steps % self.every_n_steps == 0:
            self._restart()
        factor = self._factor(num_steps)
        if factor != 1:
            self._lrs = [group["lr"] for group in self.optimizer.param_groups]
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr"] * factor

    def _restart(self) -> None:
        groups = self.optimizer.param_groups
        params = [p for group in groups for p in group["params"] if p.grad is not None]
        set_aside(self.optimizer, params)
        for p in params:
            self.optimizer.state.pop(p, None)
        for group in groups:
            group.pop("step", None)  # where pytorch_optimizer counts

    def _after(self, num_steps: int) -> None:
        self._cancel()
        self._tell(num_steps)

    def _cancel(self) -> None:
        bring_back(self.optimizer)
        for group, lr in zip(self.optimizer.param_groups, self._lrs, strict=False):
            group["lr"] = lr
        self._lrs = []


def attach_momentum_reset(
    optimizer: Optimizer, *, every_n_steps: int = 200, recovery_steps: int = 10
) -> MomentumResetHandle:
    r"""Restart the moments and step counts of an optimizer every so often, in a loop of your own.

    Before the steps :math:`n, 2n, \dots` (counted from 0) the state of every parameter that has a
    gradient is dropped, so that the optimizer makes it anew as in its first step. The direction of
    EMA-Nesterov is no part of that, and stays. The learning rate of the following steps is
    multiplied by

    .. math:: f_j = 10^{-3} + (1 - 10^{-3})\, \frac{j}{\max(1, k - 1)}, \qquad j = 0, \dots, k - 1,

    with :math:`k` recovery steps. Schedulers and loggers see the rate without it; EMA-Nesterov's
    step size follows the rate with it.

    The count is in the optimizer's own state: a run continues from a checkpoint bitwise. Attach
    before or after EMA-Nesterov, and before a distributed checkpoint is loaded.

    Args:
        optimizer: Any optimizer that makes its state in its first step.
        every_n_steps: Steps :math:`n` between two restarts, at least 1.
        recovery_steps: Steps :math:`k` of the rate's way back, from 0 to ``every_n_steps``.

    Returns:
        A handle with ``detach()``.

    Raises:
        ValueError: If an argument is out of its range, or if the optimizer makes its state when it
            is made, as Adagrad does.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.AdamW([weight], lr=0.1)
        >>> handle = attach_momentum_reset(optimizer, every_n_steps=3, recovery_steps=0)
        >>> for _ in range(4):
        ...     weight.grad = torch.ones(1)
        ...     optimizer.step()
        >>> optimizer.state[weight]["step"]
        tensor(1.)
    """
    check_reset(every_n_steps, recovery_steps)
    # Nobody would make it a second time.
    if isinstance(optimizer, Adagrad):
        raise ValueError(
            f"optimizer must make its state in its first step, and {type(optimizer).__qualname__} "
            "makes it when it is made. Use RMSprop or AdamW."
        )
    return MomentumResetHandle(optimizer, every_n_steps, recovery_steps)


def recovery_factor(steps_since: int, recovery_steps: int) -> float:
    """Return the factor on the learning rate, so many steps after a restart.

    Args:
        steps_since: Steps since the restart, 0 for the first one.
        recovery_steps: Steps of the way back.

    Example:
        >>> [round(recovery_factor(j, 4), 3) for j in range(5)]
        [0.001, 0.334, 0.667, 1.0, 1.0]
    """
    if steps_since >= recovery_steps:
        return 1.0
    share = steps_since / max(1, recovery_steps - 1)
    return _LEAST_FACTOR + (1.0 - _LEAST_FACTOR) * share


def check_reset(every_n_steps: int, recovery_steps: int) -> None:
    """Raise a ``ValueError`` unless the arguments of a momentum reset are in their ranges."""
    check_count("every_n_steps", every_n_steps, 1)
    check_count("recovery_steps", recovery_steps, 0)
    if recovery_steps > every_n_steps:
        raise ValueError(
            f"recovery_steps must be at most every_n_steps, {every_n_steps}, got {recovery_steps}: "
            "the learning rate would never be back."
        )
