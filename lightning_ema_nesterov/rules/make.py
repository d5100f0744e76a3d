"""The arguments of EMA-Nesterov, once for every way to use it, and what is made of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from lightning_ema_nesterov.core.checks import (
    check_duration,
    check_share,
    check_step_size,
    check_unit_interval,
)
from lightning_ema_nesterov.core.rule import LookaheadRule
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.rules.codecs import DIRECTION_DTYPES
from lightning_ema_nesterov.rules.ema import EMADirections
from lightning_ema_nesterov.rules.ema_compressed import CompressedDirections
from lightning_ema_nesterov.rules.ema_joined import JoinedDirections

__all__ = ["DEFAULTS", "Settings"]


@dataclass(frozen=True)
class Settings:
    r"""The arguments of EMA-Nesterov with their defaults and ranges.

    Args:
        lookahead_step_size: Peak step size :math:`\beta`, in (-1, 1), of all parameters whose group
            has none of its own.
        ema_decay: Weight :math:`\gamma` of the past, in [0, 1).
        warmup: First steps without lookahead. ``int``: optimizer steps, at least 0. ``float``:
            fraction of the run's optimizer steps, in [0, 1].
        rest: Last steps without lookahead, given like ``warmup``.
        scale_with_lr: Whether :math:`\beta_t` follows the learning rate over its maximum.
        evaluate_at: Where the model is evaluated: at the ``"iterate"`` or at the ``"average"``.
        average_share: Share of the way from the iterate to the average, in [0, 1].
        total_steps: Optimizer steps of the run, at least 1. ``None``: whoever trains knows them.
        compile: Whether ``torch.compile`` joins passes over memory into one.
        direction_dtype: How directions are stored: ``"float32"``, ``"bfloat16"`` or ``"int8"``.

    Raises:
        TypeError: If ``compile`` or ``scale_with_lr`` is not a ``bool``, or ``total_steps`` is not
            an ``int``.
        ValueError: If an argument is out of its range.
    """

    lookahead_step_size: float = 0.5
    ema_decay: float = 0.99
    warmup: int | float = 0.3
    rest: int | float = 0.15
    scale_with_lr: bool = True
    evaluate_at: str = "iterate"
    average_share: float = 1.0
    total_steps: int | None = None
    compile: bool = False
    direction_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_step_size("lookahead_step_size", self.lookahead_step_size)
        check_unit_interval("ema_decay", self.ema_decay)
        check_duration("warmup", self.warmup)
        check_duration("rest", self.rest)
        fractions = [d for d in (self.warmup, self.rest) if isinstance(d, float)]
        if sum(fractions) > 1:
            raise ValueError(
                "warmup + rest must be at most 1 as fractions of the run, got "
                f"{self.warmup} + {self.rest}."
            )
        if self.evaluate_at not in ("iterate", "average"):
            raise ValueError(
                f"evaluate_at must be 'iterate' or 'average', got {self.evaluate_at!r}."
            )
        check_share("average_share", self.average_share)
        self._check_types()
        if self.direction_dtype not in DIRECTION_DTYPES:
            names = ", ".join(repr(name) for name in DIRECTION_DTYPES)
            raise ValueError(
                f"direction_dtype must be one of {names}, got {self.direction_dtype!r}."
            )
        if self.compile and self.direction_dtype != "float32":
            raise ValueError(
                "compile=True must go with direction_dtype='float32', got "
                f"{self.direction_dtype!r}: the compressed forms have no compiled kernel."
            )

    def _check_types(self) -> None:
        for name in ("compile", "scale_with_lr"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        steps = self.total_steps
        if steps is None:
            return
        if not isinstance(steps, int) or isinstance(steps, bool):
            raise TypeError(
                f"total_steps must be a number of optimizer steps (an int), got {steps!r}."
            )
        if steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {steps}.")

    def schedule(self, total_steps: int | None) -> LookaheadSchedule:
        """Return the step sizes of a run.

        Args:
            total_steps: Optimizer steps of the run, ``None`` where nobody knows its end.

        Raises:
            ValueError: If ``warmup`` and ``rest`` do not fit the run.
        """
        return LookaheadSchedule(
            self.lookahead_step_size,
            warmup=self.warmup,
            rest=self.rest,
            total_steps=total_steps,
            scale_with_lr=self.scale_with_lr,
        )

    def rule(
        self, base_optimizer: Optimizer, module: nn.Module | None = None, *, ends_late: bool = False
    ) -> LookaheadRule:
        """Return the EMA directions of one base optimizer.

        Args:
            base_optimizer: The optimizer whose state holds the directions.
            module: The outermost module.
            ends_late: As for :class:`JoinedDirections`; without ``compile`` it has no effect.

        Raises:
            ValueError: If FSDP (1) shards the module and could not save the directions.
        """
        if self.direction_dtype != "float32":
            modules = [] if module is None else list(module.modules())
            if any(isinstance(m, FullyShardedDataParallel) for m in modules):
                raise ValueError(
                    f"direction_dtype must be 'float32' under FSDP (1), got "
                    f"{self.direction_dtype!r}: FSDP saves states of one dtype and of the shape of "
                    "its flat parameters only. Use FSDP2 (ModelParallelStrategy), or 'float32'."
                )
            return CompressedDirections(base_optimizer, self.ema_decay, self.direction_dtype)
        if self.compile:
            return JoinedDirections(base_optimizer, self.ema_decay, ends_late=ends_late)
        return EMADirections(base_optimizer, self.ema_decay)


DEFAULTS = Settings()
"""The defaults of the callback, of ``attach_ema_nesterov`` and of LitGPT's function."""
