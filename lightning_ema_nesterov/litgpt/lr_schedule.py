"""A learning rate that is flat after its warm-up and decays at the end; LitGPT has a cosine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_ema_nesterov.core.checks import check_duration
from lightning_ema_nesterov.litgpt.run import LitGPTRun
from lightning_ema_nesterov.optimizers.from_config import (
    build_optimizer,
    check_place,
    find_module,
    yaml_key,
)
from lightning_ema_nesterov.optimizers.lr_schedule import WarmupStableDecay

__all__ = ["warmup_stable_decay"]

_PLACES = {
    "optimizer": "the outermost (optimizer.class_path)",
    "optimizer.init_args.trained_by": "directly inside low_rank",
}


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
    check_place("warmup_stable_decay", _PLACES)
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
    made = build_optimizer(optimizer, params, key=yaml_key("optimizer"), fused=fused)
    schedule = _make_schedule(run, made.defaults["lr"], decay, shape)

    def before_training_forward(state: Mapping[str, int]) -> None:
        lr = schedule.lr_at(state["step_count"])
        for group in made.param_groups:
            group["lr"] = lr

    run.before_training_forward(module, before_training_forward)
    run.log_with_training(lambda: {"learning_rate": made.param_groups[0]["lr"]})
    return made


def _make_schedule(
    run: LitGPTRun, lr: float, decay: int | float, shape: Literal["linear", "exponential"]
) -> WarmupStableDecay:
    total_steps = run.total_steps
    try:
        return WarmupStableDecay(
            lr=lr,
            min_lr=run.train.min_lr,
            warmup_steps=run.train.lr_warmup_steps or 0,
            decay_steps=decay if isinstance(decay, int) else round(decay * total_steps),
            total_steps=total_steps,
            shape=shape,
        )
    except ValueError as error:
        raise ValueError(
            "warmup_stable_decay cannot make a schedule of the optimizer's lr, train.min_lr, "
            f"train.lr_warmup_steps and {yaml_key('decay')}: {error}"
        ) from error
