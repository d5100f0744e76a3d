"""What an agent is: one process's part of a decentralized method. Torch only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from lightning_ema_nesterov.companions.decentralized.topology import Topology
from lightning_ema_nesterov.companions.decentralized.transport import PeerTransport

__all__ = ["Agent", "Step", "num_values"]


@dataclass(frozen=True)
class Step:
    """What an agent is told of a step; vectors of all parameters, of shape ``(size,)``.

    Args:
        round_idx: Index of the round, the same on all agents.
        point: Where the gradient was taken.
        gradient: At that point.
        gradient_step: The gradient times the learning rate of each parameter.
        previous: Gradient and gradient step at the agent's previous point, on the same sample;
            ``None`` in the first step, and for agents that need none.
        lr_share: Learning rate over its maximum, in [0, 1].
    """

    round_idx: int
    point: Tensor
    gradient: Tensor
    gradient_step: Tensor
    previous: tuple[Tensor, Tensor] | None
    lr_share: float


class Agent(ABC):
    """One process's part of a decentralized method.

    Args:
        point: The vector at the start, the same on every agent.
        topology: The graph.
        transport: How messages travel.
        share: Share of the coordinates in a message, in (0, 1].
        seed: Of edges and coordinates; the same on all agents.
    """

    previous_point: Tensor | None = None

    def __init__(
        self, point: Tensor, topology: Topology, transport: PeerTransport, share: float, seed: int
    ) -> None:
        self.topology = topology
        self.transport = transport
        self.seed = seed
        self.num_values = num_values(point.numel(), share)
        self.value_bytes = point.element_size()

    @abstractmethod
    def begin(self, step: Step) -> Tensor | None:
        """Exchange at the point of the gradient; return another gradient for the optimizer."""

    @abstractmethod
    def finish(self, point: Tensor) -> Tensor:
        """Return the point to hold after the optimizer's step arrived at ``point``."""

    @abstractmethod
    def bytes_of_round(self, round_idx: int) -> int:
        """Return how many bytes all agents together send in a round."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what the agent keeps between steps: live tensors by name."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what :meth:`tensors` returned."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        if "previous_point" in tensors:
            self.previous_point = tensors["previous_point"].clone()

    def _previous_tensors(self) -> dict[str, Tensor]:
        return {} if self.previous_point is None else {"previous_point": self.previous_point}


def num_values(size: int, share: float) -> int:
    """Return how many of ``size`` values a message has: at least one."""
    return min(size, max(1, round(share * size)))
