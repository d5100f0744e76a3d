"""What the callback asks the Trainer: may it train, for how long, and who is looking."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR

from lightning_ema_nesterov.core.sharding import Sharding
from lightning_ema_nesterov.trainer.import_style import (
    is_lightning,
    lightning_classes,
    lightning_function,
)

__all__ = [
    "callbacks_of",
    "check_trainer",
    "estimate_total_steps",
    "is_of_tuner",
    "is_trial",
    "is_watched_between_steps",
    "is_watched_in_window",
    "max_lrs_of_schedulers",
    "replace_method",
    "steps_per_global_step",
    "window_continues",
]

_FEW_STEPS = 100
"""Optimizer steps of a run that is limited to some batches, up to which it counts as a trial."""

_IS_OVERRIDDEN = "utilities.model_helpers.is_overridden"

# Hooks between two micro-batches of one accumulation window, where users may read parameters.
_CALLBACK_HOOKS_IN_WINDOW = ("on_train_batch_start", "on_train_batch_end")
_MODULE_HOOKS_IN_WINDOW = (
    *_CALLBACK_HOOKS_IN_WINDOW,
    "on_validation_model_eval",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
)

# Hooks of the module between an optimizer's step and the next training step.
_MODULE_HOOKS_BETWEEN_STEPS = (
    *_MODULE_HOOKS_IN_WINDOW,
    "lr_scheduler_step",
    "on_before_zero_grad",
    "optimizer_step",
    "optimizer_zero_grad",
)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a Trainer, the list itself."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set elsewhere
    return callbacks


def check_trainer(trainer: Trainer, name: str) -> None:
    """Raise where a lookahead method cannot work.

    Args:
        trainer: The Trainer, with its strategy set up.
        name: Of the callback.

    Raises:
        MisconfigurationException: For DeepSpeed and XLA, without an optimizer, and for FSDP where
            no checkpoint could be saved.
    """
    strategy = type(trainer.strategy).__name__
    if "DeepSpeed" in strategy or "XLA" in strategy:
        raise MisconfigurationException(
            f"{name} does not support {strategy}, which changes parameters outside the "
            "optimizer's step. Use DDP, FSDP or ModelParallelStrategy."
        )
    mock = lightning_classes(trainer, "core.optimizer._MockOptimizer")
    if not trainer.optimizers or isinstance(trainer.optimizers[0], mock):
        raise MisconfigurationException(
            f"{name} needs an optimizer, and configure_optimizers() returned none."
        )
    if isinstance(trainer.strategy, lightning_classes(trainer, "strategies.FSDPStrategy")):
        _check_fsdp(trainer, cast(FSDPStrategy, trainer.strategy), name)


def _check_fsdp(trainer: Trainer, strategy: FSDPStrategy, name: str) -> None:
    for optimizer in trainer.optimizers:
        try:
            Sharding(strategy.model, optimizer).check_can_save()
        except ValueError as error:
            raise MisconfigurationException(f"{name}: {error}") from error
    if strategy._state_dict_type == "full" and strategy.root_device.type == "cpu":
        raise MisconfigurationException(
            "FSDP with state_dict_type='full' crashes the process on a CPU when it saves, with or "
            f"without {name}. Use state_dict_type='sharded'."
        )


def max_lrs_of_schedulers(trainer: Trainer, optimizer: Optimizer) -> list[float]:
    """Return the largest learning rates that CyclicLR keeps to itself, one for each group."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for scheduler in schedulers:
        if isinstance(scheduler, CyclicLR) and scheduler.optimizer is optimizer:
            return [float(max_lr) for max_lr in scheduler.max_lrs]
    return []


def estimate_total_steps(trainer: Trainer) -> int | None:
    """Return the steps of each base optimizer in the whole run; ``None`` if it has no known end."""
    estimate = trainer.estimated_stepping_batches
    scheduling = lightning_classes(trainer, "callbacks.GradientAccumulationScheduler")
    for callback in callbacks_of(trainer):
        if isinstance(callback, scheduling) and trainer.max_epochs != -1:
            accumulated = cast(Any, callback).get_accumulate_grad_batches
            estimate = sum(
                -(-trainer.num_training_batches // accumulated(epoch))
                for epoch in range(trainer.max_epochs or 1)
            )
            estimate = min(estimate, trainer.max_steps) if trainer.max_steps != -1 else estimate
    if estimate in (-1, float("inf")):
        return None
    if estimate == trainer.max_steps:  # the Trainer counts the steps of all optimizers there
        estimate //= steps_per_global_step(trainer)
    return int(estimate)


def is_of_tuner(checkpoint: Path) -> bool:
    """Return whether Lightning's tuner wrote a checkpoint, to come back to the weights it found."""
    return checkpoint.name.startswith((".scale_batch_size_", ".lr_find_"))


def is_trial(trainer: Trainer, total_steps: int | None) -> bool:
    """Return whether only a few batches are trained, to try the code: no schedule has to fit.

    Args:
        trainer: The Trainer.
        total_steps: Optimizer steps of the run; ``None`` if it has no known end.
    """
    is_fast: bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # set elsewhere
    is_limited = isinstance(trainer.limit_train_batches, int)
    return is_fast or (is_limited and total_steps is not None and total_steps <= _FEW_STEPS)


def steps_per_global_step(trainer: Trainer) -> int:
    """Return how much ``trainer.global_step`` grows while each base optimizer takes one step."""
    return 1 if trainer.lightning_module.automatic_optimization else len(trainer.optimizers)


def window_continues(trainer: Trainer) -> bool:
    """Return whether the gradients of this batch still wait for more, or for the user's step."""
    return (
        not trainer.lightning_module.automatic_optimization or trainer.fit_loop._should_accumulate()
    )


def is_watched_in_window(trainer: Trainer, own: Callback) -> bool:
    """Return whether the module or a user's callback runs between two micro-batches of a window.

    Lightning's own callbacks read parameters there through ``save_checkpoint`` only.

    Args:
        trainer: The Trainer.
        own: The callback that does not count.
    """
    is_overridden = lightning_function(trainer, _IS_OVERRIDDEN)
    if any(is_overridden(hook, trainer.lightning_module) for hook in _MODULE_HOOKS_IN_WINDOW):
        return True
    lambdas = lightning_classes(trainer, "callbacks.LambdaCallback")
    for callback in callbacks_of(trainer):
        is_foreign = not is_lightning(type(callback)) or isinstance(callback, lambdas)
        if callback is not own and is_foreign:
            for hook in _CALLBACK_HOOKS_IN_WINDOW:
                # A hook may be a method of the class or, as in LambdaCallback, set on the instance.
                if is_overridden(hook, callback) or hook in vars(callback):
                    return True
    return False


def is_watched_between_steps(trainer: Trainer, own: Callback) -> bool:
    """Return whether code that is not Lightning's runs between two steps, or changes parameters.

    Validation, checkpoints and the ends of epochs do not count: the callback is told of them.

    Args:
        trainer: The Trainer.
        own: The callback that does not count.
    """
    module = trainer.lightning_module
    others = [callback for callback in callbacks_of(trainer) if callback is not own]
    parts = [*others, trainer.strategy, trainer.precision_plugin]
    is_overridden = lightning_function(trainer, _IS_OVERRIDDEN)
    # They run the user's functions, or exchange parameters with averages.
    meddling = lightning_classes(
        trainer, "callbacks.LambdaCallback", "callbacks.StochasticWeightAveraging"
    )
    return (
        not module.automatic_optimization
        or any(is_overridden(hook, module) for hook in _MODULE_HOOKS_BETWEEN_STEPS)
        or any(not is_lightning(type(part)) for part in parts)
        or any(isinstance(c, meddling) for c in others)
        or any("WeightAveraging" in base.__name__ for c in others for base in type(c).__mro__)
    )


def replace_method(owner: object, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Replace a method of one object.

    Returns:
        A function that puts back what was there.
    """
    previous = vars(owner).get(name)
    setattr(owner, name, method)
    if previous is None:
        return partial(delattr, owner, name)
    return partial(setattr, owner, name, previous)
