"""Evaluation at the average that a checkpoint holds, when no optimizer is there."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_ema_nesterov.averages.saved import SavedDirections
from lightning_ema_nesterov.core.progress import plain_name

__all__ = ["AtSavedAverage"]


class AtSavedAverage:
    """Parameters of a module at the average that a checkpoint holds.

    A copy of what this process holds of the parameters is kept meanwhile.

    Args:
        module: Holds the weights of the checkpoint.
        directions: Those of the checkpoint.
        share: Share of the way from the iterate to the average, in [0, 1].

    Raises:
        ValueError: If FSDP (1) shards the module, or it lacks parameters of the checkpoint.
    """

    @torch.no_grad()
    def __init__(self, module: nn.Module, directions: SavedDirections, share: float) -> None:
        if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
            raise ValueError(
                "evaluate_at='average' must go without FSDP (1) outside of fit, whose flat shards "
                "have no names. Write the average with `ema-nesterov average`, and evaluate that."
            )
        params = {plain_name(name): p for name, p in module.named_parameters()}
        missing = [name for name in directions.names() if name not in params]
        if missing:
            raise ValueError(
                f"The module must have the parameters of the checkpoint, and lacks {len(missing)} "
                f"of {len(directions.names())} (first: {missing[0]!r})."
            )
        self._kept = [(params[n].data, params[n].detach().clone()) for n in directions.names()]
        for name in directions.names():
            p = params[name]
            p.data.add_(_placed_like(p, directions.offset(name)), alpha=-share)

    def leave(self) -> None:
        """Return to the weights of the checkpoint, bit for bit."""
        for p, kept in self._kept:
            p.copy_(kept)


def _placed_like(p: Tensor, whole: Tensor) -> Tensor:
    whole = whole.to(p.device)
    if not isinstance(p, DTensor):
        return whole
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
