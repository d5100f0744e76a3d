"""Parameters that FSDP2 or tensor parallelism spread over processes, as DTensors.

The rules here act on the part that a process holds. A sum along a dimension that is spread needs
the other parts: such sums are added in one collective for each set of processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["add_over_shards_", "is_sharded", "local", "local_gradient"]


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(p: Tensor) -> Tensor:
    """Return the part of a parameter's gradient that belongs to the local part of the parameter.

    Raises:
        RuntimeError: If the gradient is missing or sparse.
    """
    grad = p.grad
    if grad is None or grad.is_sparse:
        raise RuntimeError(
            f"Gradients must be dense, got {'none' if grad is None else 'a sparse one'} for a "
            f"parameter of shape {tuple(p.shape)}. Build the embedding with sparse=False."
        )
    if isinstance(p, DTensor) and isinstance(grad, DTensor) and grad.placements != p.placements:
        # Tensor parallelism may leave a gradient as a sum that was not made yet.
        grad = grad.redistribute(placements=p.placements)
    return local(grad)


def is_sharded(p: Tensor) -> bool:
    """Whether a process holds only a part of the tensor."""
    return bool(_groups_of(p, range(p.ndim)))


def add_over_shards_(
    sums: Sequence[Tensor], params: Sequence[Tensor], dims: Sequence[Sequence[int]]
) -> int:
    """Complete sums that each process took over its part of a parameter, in place.

    Every process has to call it with the same parameters in the same order.

    Args:
        sums: Local sums, one tensor for each parameter.
        params: The parameters.
        dims: The dimensions of each parameter that its sum runs over.

    Returns:
        The number of collectives: one for each set of processes, none where nothing is spread.
    """
    batches: dict[dist.ProcessGroup, list[Tensor]] = {}
    for total, p, summed in zip(sums, params, dims, strict=True):
        for group in _groups_of(p, summed):
            batches.setdefault(group, []).append(total)
    # A parameter that is spread over two dimensions of the mesh is added over one after the other.
    for group, parts in batches.items():
        buffer = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(buffer, group=group)
        pieces = torch.split(buffer, [part.numel() for part in parts])
        for part, added in zip(parts, pieces, strict=True):
            part.copy_(added.view_as(part))
    return len(batches)


def _groups_of(p: Tensor, dims: Sequence[int]) -> list[dist.ProcessGroup]:
    if not isinstance(p, DTensor):
        return []
    return [
        p.device_mesh.get_group(idx)
        for idx, place in enumerate(p.placements)
        # FSDP2 over tensor parallelism has shards that are no Shard, but have a dimension too.
        if p.device_mesh.size(idx) > 1 and getattr(place, "dim", None) in dims
    ]
