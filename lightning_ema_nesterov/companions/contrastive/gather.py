"""Tensors of all processes, with gradients back to where they came from."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

__all__ = ["gather", "gather_with_gradient", "num_processes"]


def num_processes() -> int:
    """Return how many processes train together, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(tensor: Tensor) -> Tensor:
    """Return the tensors of all processes in the order of their ranks, along a new first dimension.

    Args:
        tensor: Of the same shape in every process.
    """
    if num_processes() == 1:
        return tensor.unsqueeze(0)
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(num_processes())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Return what :func:`gather` does; each process gets the gradients of all others' losses."""
    if num_processes() == 1:
        return tensor.unsqueeze(0)
    gathered: Tensor = _Gather.apply(tensor)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return gathered


class _Gather(torch.autograd.Function):
    # torch.distributed.nn's all_gather needs reduce_scatter, which gloo lacks before torch 2.8.
    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor) -> Tensor:
        return gather(tensor)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Any) -> Tensor:
        # The sum over processes: DDP divides gradients of parameters by their number afterwards.
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        part: Tensor = total[dist.get_rank()]
        return part
