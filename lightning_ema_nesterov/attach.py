"""EMA-Nesterov without the Trainer: Fabric and plain PyTorch."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.metrics import StepMetrics
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.rules.make import make_directions

__all__ = ["EMANesterovHandle", "attach_ema_nesterov"]


class EMANesterovHandle:
    """What :func:`attach_ema_nesterov` returns: a view of the method, and the way to end it."""

    def __init__(self, lookahead: Lookahead, handles: list[RemovableHandle]) -> None:
        self._lookahead = lookahead
        self._handles = handles

    def at_iterate(self) -> AbstractContextManager[None]:
        """Hold the parameters at the iterate inside a ``with`` block, wherever training is."""
        return self._lookahead.at_iterate()

    def extrapolate(self) -> None:
        """Move to the lookahead point now, as a training forward pass does by itself."""
        self._lookahead.extrapolate()

    def start_at(self, step_idx: int) -> None:
        """Set how many steps the run took before, unless a checkpoint that was loaded tells."""
        if self._lookahead.is_new:
            self._lookahead.step_idx = step_idx

    def measure_next_step(self) -> None:
        """Have the next optimizer step measured, for :attr:`metrics`."""
        self._lookahead.will_measure = True

    @property
    def metrics(self) -> StepMetrics | None:
        """The step that was measured last, ``None`` before the first."""
        return self._lookahead.metrics

    def detach(self) -> None:
        """Return the parameters to the iterate and remove all hooks. The state stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._lookahead.detach()


def attach_ema_nesterov(
    optimizer: Optimizer,
    module: nn.Module,
    *,
    lookahead_step_size: float = 0.5,
    ema_decay: float = 0.99,
    warmup: int | float = 0,
    rest: int | float = 0,
    total_steps: int | None = None,
    scale_with_lr: bool = True,
    compile: bool = False,
    ends_late: bool = False,
    direction_dtype: str = "float32",
) -> EMANesterovHandle:
    r"""Train with EMA-Nesterov in a loop of your own.

    The parameters move to the lookahead point just before a training forward pass of ``module`` and
    hold the iterate again after the optimizer's step. In the middle of an accumulation window they
    return to the iterate for a forward pass in evaluation mode or without gradients, and when
    ``module.state_dict()`` is called, until the next training forward pass.

    Attach before a checkpoint made with the method is loaded, and after one made without it: a
    distributed checkpoint is read into the state that the optimizer has.

    Args:
        optimizer: The optimizer, as ``torch.optim`` or ``Fabric.setup`` gives it.
        module: The outermost module that is called in training: after ``Fabric.setup``, DDP, FSDP,
            ``fully_shard`` and ``torch.compile``.
        lookahead_step_size: Peak step size :math:`\beta`, in [0, 1).
        ema_decay: Weight :math:`\gamma` of the past, in [0, 1).
        warmup: First steps without lookahead. ``int``: optimizer steps, at least 0. ``float``:
            fraction of ``total_steps``, in [0, 1].
        rest: Last steps without lookahead, given like ``warmup``; needs ``total_steps``.
        total_steps: Optimizer steps of the run, at least 1.
        scale_with_lr: Whether :math:`\beta_t` follows the learning rate over its maximum.
        compile: Whether ``torch.compile`` joins passes over memory. From the forward pass to the
            optimizer's step ``optimizer.state`` then holds the fold of the direction;
            ``optimizer.state_dict()`` holds the direction, and so does the state in ``at_iterate``.
        ends_late: With ``compile``: whether the end of an update waits for the next forward pass,
            which makes it one pass. Between a step and that forward pass, read the direction as
            with ``compile``, and change or exchange parameters in ``at_iterate`` only.
        direction_dtype: How directions are stored: ``"float32"``, ``"bfloat16"``, or ``"int8"``
            for matrices, the last two with stochastic rounding. They save persistent memory; while
            the optimizer steps, a copy of the parameters is kept.

    Returns:
        A handle with ``detach()``.

    Raises:
        TypeError: If ``optimizer`` is not a ``torch.optim.Optimizer``.
        ValueError: If an argument is out of its range; for FSDP (1) with ``use_orig_params=True``
            and parameters narrower than float32, whose state it cannot save.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> handle = attach_ema_nesterov(optimizer, model, warmup=100)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(4, 2)).square().mean().backward()
        ...     optimizer.step()
        >>> handle.detach()
    """
    schedule = LookaheadSchedule(
        lookahead_step_size,
        warmup=warmup,
        rest=rest,
        total_steps=total_steps,
        scale_with_lr=scale_with_lr,
    )
    base_optimizer = _without_wrapper(optimizer)
    directions = make_directions(
        base_optimizer,
        ema_decay,
        direction_dtype=direction_dtype,
        compile=compile,
        ends_late=ends_late,
        module=module,
    )
    lookahead = Lookahead(base_optimizer, schedule, directions, module=module)
    lookahead.sharding.check_can_save()
    lookahead.attach()

    def before_forward(module: nn.Module, args: Any) -> None:
        if module.training and torch.is_grad_enabled():
            lookahead.extrapolate()
        else:
            lookahead.pause()

    def before_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
        lookahead.pause()

    # Fabric calls a method like `training_step` on the module that it wraps, not on its wrapper.
    modules = {module, getattr(module, "_forward_module", module)}
    # FSDP2 gathers parameters in a pre-hook of its own, and this one has to come first.
    handles = [m.register_forward_pre_hook(before_forward, prepend=True) for m in modules]
    # Fabric's wrapper asks the module that the user gave it for the state.
    for m in modules | {getattr(module, "_original_module", module)}:
        handle = m.register_state_dict_pre_hook(before_state_dict)
        # FSDP (1) gathers parameters in a hook of its own, for which it is too late to change them.
        cast("OrderedDict[int, Any]", m._state_dict_pre_hooks).move_to_end(handle.id, last=False)
        handles.append(handle)
    return EMANesterovHandle(lookahead, handles)


def _without_wrapper(optimizer: Optimizer) -> Optimizer:
    # Fabric's wrapper is not the optimizer; one that holds another as `optimizer` is.
    if type(optimizer).__module__.endswith("fabric.wrappers"):
        return cast(Optimizer, cast(Any, optimizer).optimizer)
    return optimizer
