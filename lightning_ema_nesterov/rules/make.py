"""The form of EMA-Nesterov that the configuration asks for."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from lightning_ema_nesterov.core.rule import Method
from lightning_ema_nesterov.rules.codecs import DIRECTION_DTYPES
from lightning_ema_nesterov.rules.ema import EMADirections
from lightning_ema_nesterov.rules.ema_compressed import CompressedDirections
from lightning_ema_nesterov.rules.ema_joined import OnePassDirections

__all__ = ["check_variant", "make_directions"]


def check_variant(direction_dtype: str, *, compile: bool) -> None:
    """Raise unless there is such a form.

    Raises:
        ValueError: If ``direction_dtype`` is unknown, or cannot be compiled.
    """
    if direction_dtype not in DIRECTION_DTYPES:
        names = ", ".join(repr(name) for name in DIRECTION_DTYPES)
        raise ValueError(f"direction_dtype must be one of {names}, got {direction_dtype!r}.")
    if compile and direction_dtype != "float32":
        raise ValueError(
            f"compile=True must go with direction_dtype='float32', got {direction_dtype!r}: the "
            "compressed forms have no compiled kernel."
        )


def make_directions(
    base_optimizer: Optimizer,
    ema_decay: float,
    *,
    direction_dtype: str = "float32",
    compile: bool = False,
    ends_late: bool = False,
    module: nn.Module | None = None,
) -> Method:
    r"""Return the EMA directions of one base optimizer.

    Args:
        base_optimizer: The optimizer whose state holds the directions.
        ema_decay: Weight :math:`\gamma` of the past, in [0, 1).
        direction_dtype: How they are stored.
        compile: Whether a compiled kernel joins passes over memory.
        ends_late: As for :class:`OnePassDirections`; without ``compile`` it has no effect.
        module: The outermost module.

    Raises:
        ValueError: If there is no such form, or FSDP (1) shards the module and it cannot be saved.
    """
    check_variant(direction_dtype, compile=compile)
    if direction_dtype != "float32":
        modules = [] if module is None else list(module.modules())
        if any(isinstance(m, FullyShardedDataParallel) for m in modules):
            raise ValueError(
                f"direction_dtype must be 'float32' under FSDP (1), got {direction_dtype!r}: FSDP "
                "saves states of one dtype and of the shape of its flat parameters only. Use "
                "FSDP2 (ModelParallelStrategy), or 'float32'."
            )
        return CompressedDirections(base_optimizer, ema_decay, direction_dtype)
    if compile:
        return OnePassDirections(base_optimizer, ema_decay, ends_late=ends_late)
    return EMADirections(base_optimizer, ema_decay)
