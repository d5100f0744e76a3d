"""Messages between neighbours, over torch.distributed's point-to-point operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["PeerTransport", "pack", "unpack"]


class PeerTransport:
    """Swap messages with neighbours; gloo and NCCL by the same calls.

    The process group must exist. Waiting ends with its timeout, or earlier when the backend
    notices that the other process is gone.
    """

    def __init__(self) -> None:
        self.bytes_sent = 0

    @property
    def rank(self) -> int:
        """This process's rank, which is the agent's number."""
        return dist.get_rank()

    def swap(self, peers: Sequence[int], messages: Sequence[Tensor]) -> list[Tensor]:
        """Send each peer its message, and return what each sent, in the same order.

        Args:
            peers: Ranks, each once. Each of them must swap with this process in the same round.
            messages: One for each peer. What it sends back has the same shape and dtype.

        Returns:
            One new tensor for each peer.
        """
        received = [torch.empty_like(message) for message in messages]
        operations = []
        for peer, message, buffer in zip(peers, messages, received, strict=True):
            operations.append(dist.P2POp(dist.isend, message.contiguous(), peer))
            operations.append(dist.P2POp(dist.irecv, buffer, peer))
            self.bytes_sent += message.numel() * message.element_size()
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return received


def pack(indices: Tensor, values: Tensor) -> Tensor:
    """Put indices and values into one message: 4 bytes for each index.

    Args:
        indices: In [0, 2**31), of shape ``(num,)``.
        values: float32 or float64, of the same shape.

    Returns:
        An int32 tensor.
    """
    return torch.cat([indices.to(torch.int32), values.contiguous().view(torch.int32)])


def unpack(message: Tensor, num: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Take apart what :func:`pack` put together.

    Args:
        message: An int32 tensor.
        num: Number of indices.
        dtype: Of the values.

    Example:
        >>> message = pack(torch.tensor([2, 0]), torch.tensor([0.5, -1.0]))
        >>> unpack(message, 2, torch.float32)
        (tensor([2, 0]), tensor([ 0.5000, -1.0000]))
    """
    return message[:num].long(), message[num:].clone().view(dtype)
