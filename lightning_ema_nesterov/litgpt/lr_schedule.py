"""A learning rate that is flat after its warm-up and decays at the end; LitGPT has a cosine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_ema_nesterov.core.checks import check_duration
from lightning_ema_nesterov.litgpt.run import LitGPTRun, find_module
from lightning_ema_nesterov.optimizers.from_config import build_optimizer, check_place, yaml_key

__all__ = ["WarmupStableDecay", "warmup_stable_decay"]


@dataclass(frozen=True)
class WarmupStableDecay:
    r"""Learning rate over the optimizer steps: linear warm-up, constant, final decay.

    .. math::

        \eta_t = \begin{cases}
            \eta\,(t + 1) / \text{warmup} & t < \text{warmup} \\
            \eta - (\eta - \eta_\text{min})\, s & \text{linear} \\
            \eta\,(\eta_\text{min} / \eta)^s & \text{exponential}
        \end{cases}
        \qquad s = \max(0, 1 - (\text{total} - t) / \text{decay})

    Args:
        lr: Peak :math:`\eta`, above 0.
        min_lr: Learning rate :math:`\eta_\text{min}` at the end of the run, in [0, ``lr``].
        warmup_steps: Optimizer steps of the warm-up, at least 0.
        decay_steps: Optimizer steps of the decay, at least 0.
        total_steps: Optimizer steps of the run.
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
            raise ValueError(f"The optimizer's lr must be above 0, got {self.lr}.")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(
                f"train.min_lr must be in [0, {self.lr}], the optimizer's lr, got {self.min_lr}."
            )
        if self.shape not in ("linear", "exponential"):
            raise ValueError(f"shape must be linear or exponential, got {self.shape!r}.")
        if self.shape == "exponential" and not self.min_lr:
            raise ValueError("train.min_lr must be above 0 for an exponential decay, got 0.")
        if min(self.warmup_steps, self.decay_steps) < 0:
            raise ValueError("Warm-up and decay must be at least 0 steps.")
        if self.warmup_steps + self.decay_steps > self.total_steps:
            raise ValueError(
                f"train.lr_warmup_steps + decay must not be longer than the run, got "
                f"{self.warmup_steps} + {self.decay_steps} steps of {self.total_steps}."
            )

    def lr_at(self, step_idx: int) -> float:
        """Return the learning rate of a step.

        Args:
            step_idx: Optimizer steps taken before this one, at least 0.
        """
        if step_idx < self.warmup_steps:
            return self.lr * (step_idx + 1) / self.warmup_steps
        left = self.total_steps - step_idx
        if left >= self.decay_steps:
            return self.lr
        share = 1.0 - left / self.decay_steps
        if self.shape == "exponential":
            return float(self.lr * (self.min_lr / self.lr) ** share)
        return self.lr - (self.lr - self.min_lr) * share


def warmup_stable_decay(
    params: ParamsT,
    optimizer: str | dict[str, Any],
    decay: int | float = 0.2,
    shape: Literal["linear", "exponential"] = "linear",
    fused: bool = False,
) -> Optimizer:
    """Return an optimizer whose learning rate is flat and decays at the end of the run.

    .. code-block:: yaml

        optimizer:
          class_path: lightning_ema_nesterov.litgpt.warmup_stable_decay
          init_args:
            decay: 0.3
            optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.003}}

    It replaces LitGPT's cosine, also in what LitGPT logs as ``learning_rate``. The peak is the
    optimizer's ``lr``, the warm-up is ``train.lr_warmup_steps`` long and linear, and the decay ends
    at ``train.min_lr``.

    Args:
        params: What LitGPT gives: ``model.parameters()``.
        optimizer: Name of the optimizer, or its ``class_path`` and ``init_args``; it can be
            ``lightning_ema_nesterov.litgpt.ema_nesterov``.
        decay: Last steps, in which the learning rate falls. ``int``: optimizer steps, at least 0.
            ``float``: fraction of the run, in [0, 1].
        shape: Of the decay. Exponential needs a ``train.min_lr`` above 0.
        fused: Passed to the optimizer; LitGPT sets it on CUDA.

    Raises:
        RuntimeError: If the caller is not ``litgpt pretrain``.
        TypeError: If ``optimizer`` does not name an optimizer.
        ValueError: If an argument is out of its range, or if another function names this one.
    """
    # Inside another function it would set the learning rate after the lookahead has read it.
    check_place("warmup_stable_decay", {"optimizer": "the outermost (optimizer.class_path)"})
    check_duration(yaml_key("decay"), decay)
    run, module = LitGPTRun.find(), find_module(params)
    if run is None or module is None:
        raise RuntimeError(
            "warmup_stable_decay replaces the learning rate that litgpt pretrain sets, and it was "
            "called elsewhere. Use a scheduler of torch.optim.lr_scheduler there."
        )
    if run.train.lr_warmup_fraction:
        raise ValueError(
            "train.lr_warmup_fraction counts in epochs, which warmup_stable_decay does not know. "
            "Set train.lr_warmup_steps."
        )
    made = build_optimizer(optimizer, params, argument="optimizer", fused=fused)
    total_steps = run.total_steps
    schedule = WarmupStableDecay(
        lr=made.defaults["lr"],
        min_lr=run.train.min_lr,
        warmup_steps=run.train.lr_warmup_steps or 0,
        decay_steps=decay if isinstance(decay, int) else round(decay * total_steps),
        total_steps=total_steps,
        shape=shape,
    )

    def before_training_forward(state: Mapping[str, int]) -> None:
        lr = schedule.lr_at(state["step_count"])
        for group in made.param_groups:
            group["lr"] = lr

    run.before_training_forward(module, before_training_forward)
    run.log_with_training(lambda: {"learning_rate": made.param_groups[0]["lr"]})
    return made
