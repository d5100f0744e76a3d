"""What a decentralized callback refuses before training."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

__all__ = ["check_plain_sgd", "check_range", "check_strategy", "only_optimizer", "wrapped_model"]


def check_range(name: str, value: float, *, high: float = float("inf")) -> None:
    """Raise ``ValueError`` unless a number is above 0 and at most ``high``."""
    if not 0.0 < value <= high or value == float("inf"):
        rule = f"be in (0, {high:g}]" if high < float("inf") else "be above 0 and finite"
        raise ValueError(f"{name} must {rule}, got {value}.")


def wrapped_model(trainer: Trainer) -> DistributedDataParallel:
    """Return the model as DDPStrategy has wrapped it.

    Raises:
        TypeError: If something else wraps it.
    """
    model = trainer.strategy.model
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"The strategy's model must be DistributedDataParallel, got {type(model).__name__}."
        )
    return model


def check_strategy(trainer: Trainer, name: str) -> None:
    """Raise unless several processes train with a DDPStrategy whose all-reduce is free to go.

    Args:
        trainer: Before its strategy is set up.
        name: Of the callback.

    Raises:
        MisconfigurationException: For one process, another strategy, a communication hook of the
            strategy, and 16-mixed precision.
    """
    if trainer.world_size < 2:
        raise MisconfigurationException(
            f"{name} needs at least 2 processes, one for each agent, got 1. Use "
            "Trainer(devices=2, strategy=DDPStrategy()), or start several with torchrun."
        )
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy):
        raise MisconfigurationException(
            f"{name} needs DDPStrategy, where each process holds all parameters, got "
            f"{type(strategy).__name__}."
        )
    if strategy._ddp_comm_hook is not None or strategy._ddp_comm_state is not None:
        raise MisconfigurationException(
            f"{name} switches the all-reduce of DDP off with a communication hook, and DDPStrategy "
            "has one already. Remove ddp_comm_hook and ddp_comm_state."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise MisconfigurationException(
            f"{name} does not support precision {trainer.precision}, whose scaler would skip steps "
            "on one process and not on another. Use bf16-mixed or 32-true."
        )


def only_optimizer(trainer: Trainer, name: str) -> Optimizer:
    """Return the Trainer's optimizer.

    Raises:
        MisconfigurationException: If there is none, or more than one.
    """
    optimizers = [o for o in trainer.optimizers if not isinstance(o, _MockOptimizer)]
    if len(optimizers) != 1:
        raise MisconfigurationException(
            f"{name} needs exactly one optimizer, configure_optimizers() returned "
            f"{len(optimizers)}."
        )
    return optimizers[0]


def check_plain_sgd(optimizer: Optimizer, name: str) -> None:
    """Raise unless an optimizer's step is the gradient times the learning rate.

    Raises:
        MisconfigurationException: For another optimizer than SGD, momentum and weight decay.
    """
    if type(optimizer) is not SGD:
        raise MisconfigurationException(
            f"{name} needs torch.optim.SGD, whose learning rate is its alpha, got "
            f"{type(optimizer).__name__}."
        )
    for group in optimizer.param_groups:
        for key in ("momentum", "weight_decay", "maximize"):
            if group[key]:
                raise MisconfigurationException(
                    f"{name} needs SGD with {key}=0, got {group[key]}: it has momentum of its own, "
                    "and weight decay must be in both of its gradients. Put the decay into the "
                    "loss."
                )
