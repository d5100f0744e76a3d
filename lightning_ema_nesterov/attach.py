"""EMA-Nesterov without the Trainer: Fabric and plain PyTorch."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ema_nesterov.core.claims import check_params_are_free
from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.metrics import StepMetrics
from lightning_ema_nesterov.core.module_hooks import ModuleHooks
from lightning_ema_nesterov.rules.make import DEFAULTS, Settings

__all__ = ["EMANesterovHandle", "attach_ema_nesterov"]

_STEPS_BEFORE_WARNING = 3
_WRAPPERS = ("lightning.fabric.wrappers", "lightning_fabric.wrappers", "accelerate.optimizer")


class EMANesterovHandle:
    """What :func:`attach_ema_nesterov` returns: a view of the method, and the way to end it."""

    def __init__(self, lookahead: Lookahead, module_hooks: ModuleHooks) -> None:
        self._lookahead = lookahead
        self._module_hooks = module_hooks
        self._handles: list[RemovableHandle] = []
        self._num_unseen_steps = 0

    def at_iterate(self) -> AbstractContextManager[None]:
        """Hold the parameters at the iterate inside a ``with`` block, wherever training is.

        A training forward pass must not run in it; an evaluation sees the iterate.
        """
        return self._module_hooks.at_iterate()

    def at_average(self, share: float = 1.0) -> AbstractContextManager[None]:
        """Hold the parameters at the average of the iterates inside a ``with`` block.

        Afterwards they hold what they held before, bit for bit. A copy of what this process holds
        of the parameters is kept meanwhile; nothing is communicated.

        Args:
            share: Share of the way from the iterate to the average, in [0, 1].

        Raises:
            ValueError: If ``share`` is out of its range.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> handle = attach_ema_nesterov(optimizer, model, ema_decay=0.5, warmup=0, rest=0)
            >>> x_0 = model.weight.item()
            >>> model(torch.ones(1, 1)).sum().backward()
            >>> optimizer.step()
            >>> with handle.at_average():  # half way between x_0 and x_1 = x_0 - 0.1
            ...     print(round(x_0 - model.weight.item(), 6))
            0.05
        """
        return self._module_hooks.at_average(share)

    def extrapolate(self) -> None:
        """Move to the lookahead point now, as a training forward pass does by itself.

        For training in evaluation mode, or by calls of parts of the module: call it before the
        first forward pass of each step. Until that step, a forward pass of the module in evaluation
        mode with gradients counts as one of training.
        """
        self._module_hooks.extrapolate()

    def start_at(self, step_idx: int) -> None:
        """Set how many steps the run took before, unless a checkpoint that was loaded tells."""
        if self._lookahead.progress.is_new:
            self._lookahead.progress.step_idx = step_idx

    def measure_next_step(self) -> None:
        """Have the next optimizer step measured, for :attr:`metrics`."""
        self._lookahead.will_measure = True

    @property
    def metrics(self) -> StepMetrics | None:
        """The step that was measured last, ``None`` before the first."""
        return self._lookahead.metrics

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._module_hooks.is_held = False
        self._num_unseen_steps += 1
        if self._lookahead.was_extrapolated:
            self._num_unseen_steps = 0
        if self._num_unseen_steps == _STEPS_BEFORE_WARNING:
            warnings.warn(
                f"EMA-Nesterov does not look ahead: {_STEPS_BEFORE_WARNING} optimizer steps came "
                "without a training forward pass of the attached module. Attach to the module that "
                "the training step calls; where it is in evaluation mode, or only its parts are "
                "called, call extrapolate() of the handle before each forward pass.",
                stacklevel=2,
            )

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
    lookahead_step_size: float = DEFAULTS.lookahead_step_size,
    ema_decay: float = DEFAULTS.ema_decay,
    warmup: int | float = DEFAULTS.warmup,
    rest: int | float = DEFAULTS.rest,
    scale_with_lr: bool = DEFAULTS.scale_with_lr,
    evaluate_at: Literal["iterate", "average"] = "iterate",
    average_share: float = DEFAULTS.average_share,
    total_steps: int | None = DEFAULTS.total_steps,
    compile: bool = DEFAULTS.compile,
    ends_late: bool = False,
    direction_dtype: str = DEFAULTS.direction_dtype,
) -> EMANesterovHandle:
    r"""Train with EMA-Nesterov in a loop of your own.

    The parameters move to the lookahead point just before a training forward pass of ``module`` and
    hold the iterate again after the optimizer's step. In between, a forward pass in evaluation mode
    or without gradients and ``state_dict()`` see the iterate (``state_dict()`` then gives copies),
    and what follows is as if nobody had looked. Loading weights ends what is under way. A copy of
    the module, by ``copy.deepcopy`` or ``pickle``, is a plain module, and is refused in between.
    Whoever reads parameters in between in another way (``parameters()``, a call of a part of the
    module) does it inside of ``at_iterate()`` of the handle.

    A distributed checkpoint that was made with the method: attach, then load. One that was made
    without: load, then attach.

    Args:
        optimizer: The optimizer, as ``torch.optim`` or ``Fabric.setup`` gives it.
        module: The outermost module that is called in training: after ``Fabric.setup``, DDP, FSDP,
            ``fully_shard`` and ``torch.compile``.
        lookahead_step_size: Peak step size :math:`\beta`, in (-1, 1). A parameter group with the
            key ``"lookahead_step_size"`` has that instead; at 0 it does not look ahead.
        ema_decay: Weight :math:`\gamma` of the past, in [0, 1).
        warmup: First steps without lookahead. ``int``: optimizer steps, at least 0. ``float``:
            fraction of ``total_steps``, in [0, 1].
        rest: Last steps without lookahead, given like ``warmup``; needs ``total_steps``.
        scale_with_lr: Whether :math:`\beta_t` follows the learning rate over its maximum.
        evaluate_at: What a forward pass in evaluation mode or without gradients sees: the
            ``"iterate"``, or the ``"average"`` of the iterates. ``state_dict()`` is the iterate's.
        average_share: Share of the way from the iterate to the average, in [0, 1].
        total_steps: Optimizer steps of the run, at least 1; needed where ``warmup`` or ``rest`` is
            a fraction, and for any ``rest``.
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
        RuntimeError: If a lookahead method is attached to the optimizer already, or to another one
            of its parameters: detach it first.
        TypeError: If ``optimizer`` is not a ``torch.optim.Optimizer`` or ``module`` no module.
        ValueError: If an argument, or that key, is out of its range, if a fraction is given without
            ``total_steps``, if ``module`` owns no parameter of the optimizer, or for FSDP (1) with
            ``use_orig_params=True`` and parameters narrower than float32, which it cannot save.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> handle = attach_ema_nesterov(optimizer, model, total_steps=1000)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(4, 2)).square().mean().backward()
        ...     optimizer.step()
        >>> handle.detach()
    """
    settings = Settings(
        lookahead_step_size,
        ema_decay,
        warmup=warmup,
        rest=rest,
        scale_with_lr=scale_with_lr,
        evaluate_at=evaluate_at,
        average_share=average_share,
        total_steps=total_steps,
        compile=compile,
        direction_dtype=direction_dtype,
    )
    base_optimizer = _without_wrapper(optimizer)
    rule = settings.rule(base_optimizer, module, ends_late=ends_late)
    _check_module(module, rule.store.all_params())
    lookahead = Lookahead(rule, settings.schedule(total_steps), module=module)
    lookahead.sharding.check_can_save()
    check_params_are_free(base_optimizer)
    share = average_share if evaluate_at == "average" else None
    module_hooks = ModuleHooks(lookahead, share)
    lookahead.follows_module = True
    lookahead.attach()
    _warn_of_what_is_odd(lookahead)
    handle = EMANesterovHandle(lookahead, module_hooks)
    # Fabric calls a method like `training_step` on the module that it wraps, not on its wrapper,
    # and its wrapper asks the module that the user gave it for the state.
    called = {module, getattr(module, "_forward_module", module)}
    owners = called | {getattr(module, "_original_module", module)}
    handle._handles = [
        *module_hooks.register(called, owners),
        base_optimizer.register_step_post_hook(handle._after_step),
    ]
    return handle


def _check_module(module: nn.Module, params: list[Tensor]) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(
            "module must be the torch.nn.Module that the training step calls, got "
            f"{type(module).__module__}.{type(module).__qualname__}."
        )
    own = set(module.parameters())
    if not any(p in own for p in params):
        raise ValueError(
            f"module must own parameters of the optimizer, and {type(module).__qualname__} owns "
            f"none of its {len(params)}. Attach to the module that the training step calls."
        )


def _warn_of_what_is_odd(lookahead: Lookahead) -> None:
    schedule, optimizer = lookahead.schedule, lookahead.base_optimizer
    is_asked_to = schedule.lookahead_step_size or any(lookahead.scope.peaks(schedule))
    if is_asked_to and not lookahead.scope.is_ever_ahead(schedule):
        warnings.warn(
            "EMA-Nesterov never looks ahead in this run, so training equals the base optimizer "
            f"alone: {schedule}.",
            stacklevel=3,
        )
    known = lookahead.rule.store.known_params()
    if lookahead.progress.is_new and any(t.any() for t in lookahead.rule.store.column(known)):
        warnings.warn(
            f"{type(optimizer).__qualname__} has directions of EMA-Nesterov for {len(known)} "
            "parameters and no number of steps, as after copying or pickling the optimizer itself: "
            "the schedule begins at step 0. Load optimizer.state_dict(), or call start_at() of the "
            "handle.",
            stacklevel=3,
        )


def _without_wrapper(optimizer: Optimizer) -> Optimizer:
    # The wrappers of Fabric and Accelerate are not the optimizer; one that is an optimizer of its
    # own and holds another as `optimizer` is.
    if type(optimizer).__module__ in _WRAPPERS:
        return cast(Optimizer, cast(Any, optimizer).optimizer)
    return optimizer
