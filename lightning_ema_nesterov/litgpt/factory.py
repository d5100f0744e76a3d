"""EMA-Nesterov for LitGPT: the function that ``optimizer.class_path`` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_ema_nesterov.attach import EMANesterovHandle, attach_ema_nesterov
from lightning_ema_nesterov.litgpt.roles import set_step_sizes
from lightning_ema_nesterov.litgpt.run import LitGPTRun
from lightning_ema_nesterov.optimizers.from_config import (
    build_optimizer,
    check_place,
    find_module,
    yaml_key,
)
from lightning_ema_nesterov.rules.make import DEFAULTS

__all__ = ["ema_nesterov"]

# Inside by_role it would move a part of the model, inside itself all of it twice.
_PLACES = {
    "optimizer": "the outermost (optimizer.class_path)",
    "optimizer.init_args.optimizer": "directly inside warmup_stable_decay or momentum_reset",
    "optimizer.init_args.trained_by": "directly inside low_rank",
    "optimizer.init_args.trained_by.init_args.optimizer": "inside warmup_stable_decay in low_rank",
}


def ema_nesterov(
    params: ParamsT,
    base: str | dict[str, Any],
    lookahead_step_size: float = DEFAULTS.lookahead_step_size,
    ema_decay: float = DEFAULTS.ema_decay,
    warmup: int | float = DEFAULTS.warmup,
    rest: int | float = DEFAULTS.rest,
    scale_with_lr: bool = DEFAULTS.scale_with_lr,
    evaluate_at: Literal["iterate", "average"] = "iterate",
    average_share: float = DEFAULTS.average_share,
    total_steps: int | None = DEFAULTS.total_steps,
    compile: bool = DEFAULTS.compile,
    direction_dtype: str = DEFAULTS.direction_dtype,
    lookahead_step_size_by_role: dict[str, float] | None = None,
    fused: bool = False,
) -> Optimizer:
    r"""Return a base optimizer with EMA-Nesterov attached, for ``optimizer`` in a LitGPT YAML.

    .. code-block:: yaml

        optimizer:
          class_path: lightning_ema_nesterov.litgpt.ema_nesterov
          init_args:
            base: {class_path: torch.optim.AdamW, init_args: {lr: 0.003, betas: [0.9, 0.95]}}

    Training forward passes see the lookahead point, validation and every checkpoint the iterate.
    Under ``litgpt pretrain``, ``ema_nesterov/*`` is logged beside the training loss.

    Args:
        params: What LitGPT gives: ``model.parameters()``.
        base: Name of the base optimizer, or its ``class_path`` and ``init_args``.
        lookahead_step_size: Peak step size :math:`\beta`, in (-1, 1).
        ema_decay: Weight :math:`\gamma` of the past, in [0, 1).
        warmup: First steps without lookahead. ``int``: optimizer steps, at least 0. ``float``:
            fraction of the run, in [0, 1].
        rest: Last steps without lookahead, given like ``warmup``.
        scale_with_lr: Whether :math:`\beta_t` follows the learning rate over its maximum.
        evaluate_at: Where LitGPT's validation runs: at the ``"iterate"`` or at the ``"average"`` of
            the iterates. Checkpoints hold the iterate all the same.
        average_share: Share of the way from the iterate to the average, in [0, 1].
        total_steps: Optimizer steps of the run. Under ``litgpt pretrain`` they follow from
            ``train.max_tokens``, which a number here must not contradict.
        compile: Whether ``torch.compile`` joins passes over memory, in LitGPT's loop into one.
        direction_dtype: How directions are stored: ``"float32"``, ``"bfloat16"`` or ``"int8"``.
        lookahead_step_size_by_role: Other peaks for parameters of a role, ``hidden``,
            ``embedding``, ``head`` or ``other``: ``{embedding: 0, head: 0}`` leaves them out.
        fused: Passed to the base optimizer; LitGPT sets it on CUDA.

    Returns:
        The base optimizer itself.

    Raises:
        RuntimeError: If step sizes are given by role and the model cannot be found.
        TypeError: If ``base`` does not name an optimizer.
        ValueError: If an argument is out of its range or contradicts the run, or if it is named
            inside ``by_role`` or itself.
    """
    check_place("ema_nesterov", _PLACES)
    run = LitGPTRun.find()
    if run is not None:
        total_steps = run.check_total_steps(total_steps, key=yaml_key("total_steps"))
    module = find_module(params)
    optimizer = build_optimizer(base, params, key=yaml_key("base"), fused=fused)
    if lookahead_step_size_by_role:
        argument = yaml_key("lookahead_step_size_by_role")
        set_step_sizes(optimizer, module, lookahead_step_size_by_role, argument=argument)

    def attach(module: nn.Module) -> EMANesterovHandle:
        handle = attach_ema_nesterov(
            optimizer,
            module,
            lookahead_step_size=lookahead_step_size,
            ema_decay=ema_decay,
            warmup=warmup,
            rest=rest,
            scale_with_lr=scale_with_lr,
            evaluate_at=evaluate_at,
            average_share=average_share,
            total_steps=total_steps,
            compile=compile,
            ends_late=run is not None,  # LitGPT's loop reads nothing between two steps
            direction_dtype=direction_dtype,
        )
        if run is not None:
            _follow(run, module, handle)
        return handle

    if module is None:
        _attach_at_first_forward(optimizer, attach)
    else:
        attach(module)
    return optimizer


def _follow(run: LitGPTRun, module: nn.Module, handle: EMANesterovHandle) -> None:
    """Keep to LitGPT's count of steps, and log with it."""

    def before_training_forward(state: Mapping[str, int]) -> None:
        handle.start_at(state["step_count"])
        if run.is_logged(state):
            handle.measure_next_step()

    def scalars() -> dict[str, float]:
        return {} if handle.metrics is None else handle.metrics.as_scalars()

    run.before_training_forward(module, before_training_forward)
    run.log_with_training(scalars)


def _attach_at_first_forward(
    optimizer: Optimizer, attach: Callable[[nn.Module], EMANesterovHandle]
) -> None:
    """Attach to the outermost module that is called in training and owns all parameters."""
    wanted = {p for group in optimizer.param_groups for p in group["params"]}

    def before_forward(module: nn.Module, args: Any) -> None:
        if module.training and torch.is_grad_enabled() and wanted.issubset(module.parameters()):
            for hook in hooks:
                hook.remove()
            attach(module).extrapolate()  # this call does not run the hooks that it registers

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        raise RuntimeError(
            "optimizer.class_path: ema_nesterov found no model that owns the "
            f"{len(wanted)} parameters it was given, and cannot look ahead. Give it "
            "model.parameters() of the module that is called in training."
        )

    hooks = [
        register_module_forward_pre_hook(before_forward),
        optimizer.register_step_pre_hook(before_step),
    ]
