"""Low-rank models and momentum resets for LitGPT, named in ``optimizer`` of its YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_ema_nesterov.low_rank import (
    LowRankLinear,
    attach_momentum_reset,
    attach_weight_refactorization,
    to_low_rank_,
)
from lightning_ema_nesterov.optimizers.from_config import (
    build_optimizer,
    check_place,
    find_module,
    yaml_key,
)

__all__ = ["convert_before_setup", "low_rank", "momentum_reset"]

_CLASS_PATH = "lightning_ema_nesterov.litgpt.low_rank"


def low_rank(
    params: ParamsT,
    rank: int,
    trained_by: str | dict[str, Any],
    alpha: float = 32.0,
    sparsity: float = 0.0,
    refactorize_every_n_steps: int | None = None,
    fused: bool = False,
) -> Optimizer:
    """Give the model low-rank linear layers, and return the optimizer that trains it.

    .. code-block:: yaml

        optimizer:
          class_path: lightning_ema_nesterov.litgpt.low_rank
          init_args:
            rank: 128
            refactorize_every_n_steps: 200
            trained_by: {class_path: torch.optim.AdamW, init_args: {lr: 0.0015}}

    LitGPT has no key for a model of low rank, and an optimizer is the last that it makes before it
    trains. Attention and MLP layers are replaced, embedding, head and norms are not. On one device
    LitGPT's own command does; on several ``ema-nesterov pretrain --strategy ddp`` makes the layers
    before it wraps the model. The number of parameters that LitGPT prints is that of the dense
    model.

    Args:
        params: What LitGPT gives: ``model.parameters()``.
        rank: Rank of each layer, from 1 to the smaller side of each weight.
        trained_by: Name of the optimizer, or its ``class_path`` and ``init_args``; it can be
            ``warmup_stable_decay``, ``ema_nesterov`` or ``momentum_reset``.
        alpha: Scale of each product, above 0: the weight is ``alpha / rank`` times it.
        sparsity: Share of the entries that are trained besides, in [0, 1).
        refactorize_every_n_steps: Steps between two refactorizations, at least 1. ``None``: none.
        fused: Passed to the optimizer; LitGPT sets it on CUDA.

    Raises:
        RuntimeError: If the model cannot be found, or is wrapped for several devices already.
        TypeError: If ``trained_by`` does not name an optimizer.
        ValueError: If an argument is out of its range, or if another function names this one.
    """
    # Inside of another function it would change the model after others have looked at it.
    check_place("low_rank", {"optimizer": "the outermost (optimizer.class_path)"})
    module = find_module(params)
    if module is None:
        raise RuntimeError(
            "low_rank changes the layers of the model and cannot find it. Give it "
            "model.parameters() as it is, not a list."
        )
    if not any(isinstance(m, LowRankLinear) for m in module.modules()):
        _check_unwrapped(module)
        _convert(module, rank, alpha, sparsity)
    made = build_optimizer(trained_by, params, key=yaml_key("trained_by"), fused=fused)
    if refactorize_every_n_steps is not None:
        _attach_refactorization(made, module, refactorize_every_n_steps)
    return made


def momentum_reset(
    params: ParamsT,
    optimizer: str | dict[str, Any],
    every_n_steps: int = 200,
    recovery_steps: int = 10,
    fused: bool = False,
) -> Optimizer:
    """Return an optimizer whose moments and step counts restart every so often.

    .. code-block:: yaml

        class_path: lightning_ema_nesterov.litgpt.momentum_reset
        init_args:
          every_n_steps: 200
          optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.0015}}

    :func:`~lightning_ema_nesterov.low_rank.attach_momentum_reset` says what is done when. It can
    stand inside ``ema_nesterov`` and ``warmup_stable_decay``, not inside ``by_role``. The
    ``learning_rate`` that LitGPT logs is the one without the factor of the recovery.

    Args:
        params: What LitGPT gives: ``model.parameters()``.
        optimizer: Name of the optimizer, or its ``class_path`` and ``init_args``.
        every_n_steps: Steps between two restarts, at least 1.
        recovery_steps: Steps of the learning rate's way back, from 0 to ``every_n_steps``.
        fused: Passed to the optimizer; LitGPT sets it on CUDA.

    Raises:
        TypeError: If ``optimizer`` does not name an optimizer.
        ValueError: If an argument is out of its range, or if ``by_role`` names this function.
    """
    key = yaml_key("every_n_steps").removesuffix(".init_args.every_n_steps")
    if key.endswith((".hidden_matrices", ".others")):
        raise ValueError(
            f"{key} names momentum_reset, which must stand outside of by_role: "
            "momentum_reset restarts both of its optimizers together."
        )
    made = build_optimizer(optimizer, params, key=yaml_key("optimizer"), fused=fused)
    attach_momentum_reset(made, every_n_steps=every_n_steps, recovery_steps=recovery_steps)
    return made


def convert_before_setup(model: nn.Module, optimizer: object) -> None:
    """Make the layers that an ``optimizer`` block names, before a model is wrapped.

    Args:
        model: The model, with its weights.
        optimizer: The block of the YAML.
    """
    if isinstance(optimizer, Mapping) and optimizer.get("class_path") == _CLASS_PATH:
        args = optimizer.get("init_args", {})
        if "rank" in args:  # else the call of the function says what is missing
            _convert(model, args["rank"], args.get("alpha", 32.0), args.get("sparsity", 0.0))


def _convert(module: nn.Module, rank: int, alpha: float, sparsity: float) -> None:
    dense = sum(p.numel() for p in module.parameters())
    names = to_low_rank_(module, rank=rank, alpha=alpha, sparsity=sparsity)
    left = sum(p.numel() for p in module.parameters())
    rank_zero_info(
        f"low_rank replaced {len(names)} layers (first: {names[0]!r}): {left:,} parameters are "
        f"left of {dense:,}."
    )


def _check_unwrapped(module: nn.Module) -> None:
    wrappers = (DistributedDataParallel, FullyShardedDataParallel)
    is_wrapped = any(isinstance(m, wrappers) for m in module.modules())
    if is_wrapped or any(_is_shard(p) for p in module.parameters()):
        raise RuntimeError(
            "low_rank must change the layers before the model is wrapped for several devices, and "
            "LitGPT has wrapped it. Train with `ema-nesterov pretrain --strategy ddp`, or on one "
            "device."
        )


def _is_shard(p: Tensor) -> bool:
    return isinstance(p, DTensor) or p.is_meta


def _attach_refactorization(optimizer: Optimizer, module: nn.Module, every_n_steps: int) -> None:
    try:
        attach_weight_refactorization(optimizer, module, every_n_steps=every_n_steps)
    except ValueError as error:
        key = yaml_key("refactorize_every_n_steps")
        raise ValueError(f"{key} cannot be followed: {error}") from error
