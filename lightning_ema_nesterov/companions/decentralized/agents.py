"""One agent of each method: it exchanges messages with its neighbours, and moves its own vector.

Torch only. The callbacks drive agents from the Trainer; another training loop can do the same:
``begin`` with the gradient, the optimizer's step, ``finish``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ema_nesterov.companions.decentralized.agent import Agent, Step
from lightning_ema_nesterov.companions.decentralized.docom import (
    CompressedGossip,
    momentum_gradient,
)
from lightning_ema_nesterov.companions.decentralized.fspda import (
    StormState,
    add_disagreement_,
    sa_correction_,
    storm_displacement_,
)
from lightning_ema_nesterov.companions.decentralized.topology import Topology, draw_coordinates
from lightning_ema_nesterov.companions.decentralized.transport import PeerTransport, pack, unpack

__all__ = ["DoCoMAgent", "SAAgent", "StormAgent"]


class _FSPDAAgent(Agent):
    """What SA and STORM share: three step sizes, the disagreement, a correction after the step."""

    num_points = 1  # how many points' values travel

    def __init__(
        self,
        point: Tensor,
        topology: Topology,
        transport: PeerTransport,
        share: float,
        seed: int,
        *,
        consensus_step_size: float,
        dual_step_size: float,
        dual_growth: float,
    ) -> None:
        super().__init__(point, topology, transport, share, seed)
        self.consensus_step_size = consensus_step_size
        self.dual_step_size = dual_step_size
        self.dual_growth = dual_growth
        self._correction = torch.zeros(())

    def _disagreements(self, round_idx: int, points: list[Tensor]) -> list[Tensor]:
        edges = self.topology.active_edges(self.seed, round_idx)
        links = self.topology.links(self.transport.rank, edges)
        drawn, messages = [], []
        for edge_idx, _ in links:
            coordinates = draw_coordinates(
                points[0].numel(), self.num_values, self.seed, round_idx, edge_idx, points[0].device
            )
            drawn.append(coordinates)
            messages.append(
                torch.stack([p if coordinates is None else p[coordinates] for p in points])
            )
        received = self.transport.swap([peer for _, peer in links], messages)
        totals = [torch.zeros_like(p) for p in points]
        for coordinates, own, theirs in zip(drawn, messages, received, strict=True):
            for total, mine, other in zip(totals, own, theirs, strict=True):
                add_disagreement_(total, mine, other, coordinates)
        return totals

    @override
    def finish(self, point: Tensor) -> Tensor:
        correction, self._correction = self._correction, torch.zeros(())
        return point - correction

    @override
    def bytes_of_round(self, round_idx: int) -> int:
        num_edges = len(self.topology.active_edges(self.seed, round_idx))
        num_points = 1 if self.previous_point is None else self.num_points
        return 2 * num_edges * num_points * self.num_values * self.value_bytes


class SAAgent(_FSPDAAgent):
    """FSPDA-SA; see :func:`~.fspda.sa_correction_` for the rule and the three step sizes."""

    def __init__(
        self,
        point: Tensor,
        topology: Topology,
        transport: PeerTransport,
        share: float,
        seed: int,
        **step_sizes: float,
    ) -> None:
        super().__init__(point, topology, transport, share, seed, **step_sizes)
        self.duals = torch.zeros_like(point)

    @override
    def begin(self, step: Step) -> Tensor | None:
        (disagreement,) = self._disagreements(step.round_idx, [step.point])
        self._correction = sa_correction_(
            self.duals,
            disagreement,
            consensus_step_size=self.consensus_step_size,
            dual_step_size=self.dual_step_size * step.lr_share,
            dual_growth=self.dual_growth,
        )
        return None

    @override
    def tensors(self) -> dict[str, Tensor]:
        return {"duals": self.duals}


class StormAgent(_FSPDAAgent):
    """FSPDA-STORM; see :func:`~.fspda.storm_displacement_`. The optimizer is plain SGD."""

    num_points = 2

    def __init__(
        self,
        point: Tensor,
        topology: Topology,
        transport: PeerTransport,
        share: float,
        seed: int,
        *,
        primal_weight: float,
        dual_weight: float,
        **step_sizes: float,
    ) -> None:
        super().__init__(point, topology, transport, share, seed, **step_sizes)
        self.primal_weight = primal_weight
        self.dual_weight = dual_weight
        self.state = StormState.zeros_like(point)

    @override
    def begin(self, step: Step) -> Tensor | None:
        points = [step.point]
        if self.previous_point is not None:
            points.append(self.previous_point)
        disagreements = self._disagreements(step.round_idx, points)
        displacement = storm_displacement_(
            self.state,
            (step.gradient_step, step.previous[1] if step.previous else None),
            (disagreements[0], disagreements[1] if step.previous else None),
            consensus_step_size=self.consensus_step_size,
            dual_step_size=self.dual_step_size * step.lr_share,
            dual_growth=self.dual_growth,
            primal_weight=self.primal_weight,
            dual_weight=self.dual_weight,
        )
        # SGD takes the plain gradient's step; the rest of the displacement follows it.
        self._correction = displacement - step.gradient_step
        self.previous_point = step.point
        return None

    @override
    def tensors(self) -> dict[str, Tensor]:
        state = self.state
        own = {"duals": state.duals, "primal": state.primal, "dual": state.dual}
        return {**own, **self._previous_tensors()}


class DoCoMAgent(Agent):
    r"""DoCoM with top-k messages over all edges of the graph.

    .. math::

        v &\leftarrow \nabla f(x_t; \xi) + (1 - \beta)(v - \nabla f(x_{t-1}; \xi)) \\
        g &\leftarrow \operatorname{gossip}(g + v_{\text{new}} - v_{\text{old}}) \\
        x &\leftarrow \operatorname{gossip}(A(x; g))

    A is the optimizer's step, :math:`x - \eta g` with SGD, and gossip is that of
    :class:`~.docom.CompressedGossip`. The first step has :math:`v = g = \nabla f(x_0; \xi)`.
    """

    def __init__(
        self,
        point: Tensor,
        topology: Topology,
        transport: PeerTransport,
        share: float,
        seed: int,
        *,
        consensus_step_size: float,
        momentum_weight: float,
    ) -> None:
        super().__init__(point, topology, transport, share, seed)
        self.consensus_step_size = consensus_step_size
        self.momentum_weight = momentum_weight
        self.estimate = torch.zeros_like(point)
        self.tracker = torch.zeros_like(point)
        self.points = CompressedGossip(point.clone(), self.num_values)
        self.trackers = CompressedGossip(torch.zeros_like(point), self.num_values)
        self._weights = topology.mixing_weights()
        self._links = topology.links(transport.rank, tuple(range(len(topology.edges))))

    @override
    def begin(self, step: Step) -> Tensor | None:
        if step.previous is None:
            self.estimate.copy_(step.gradient)
            self.tracker.copy_(step.gradient)
        else:
            new = momentum_gradient(
                self.estimate, step.gradient, step.previous[0], self.momentum_weight
            )
            moved = self.tracker + (new - self.estimate)
            self.estimate.copy_(new)
            self.tracker.copy_(self._gossip(self.trackers, moved))
        self.previous_point = step.point
        return self.tracker

    @override
    def finish(self, point: Tensor) -> Tensor:
        return self._gossip(self.points, point)

    def _gossip(self, gossip: CompressedGossip, vector: Tensor) -> Tensor:
        indices, values = gossip.compress(vector)
        message = pack(indices, values)
        peers = [peer for _, peer in self._links]
        received = self.transport.swap(peers, [message] * len(peers))
        weights = [self._weights[self.topology.edges[edge_idx]] for edge_idx, _ in self._links]
        gossip.receive(1.0 - sum(weights), indices, values)
        for weight, theirs in zip(weights, received, strict=True):
            gossip.receive(weight, *unpack(theirs, gossip.num, values.dtype))
        return gossip.mix(vector, consensus_step_size=self.consensus_step_size)

    @override
    def bytes_of_round(self, round_idx: int) -> int:
        num_messages = 1 if round_idx == 0 else 2
        message = self.num_values * (4 + self.value_bytes)
        return 2 * len(self.topology.edges) * num_messages * message

    @override
    def tensors(self) -> dict[str, Tensor]:
        own = {
            "estimate": self.estimate,
            "tracker": self.tracker,
            "public_point": self.points.public,
            "mixed_points": self.points.mixed,
            "public_tracker": self.trackers.public,
            "mixed_trackers": self.trackers.mixed,
        }
        return {**own, **self._previous_tensors()}
