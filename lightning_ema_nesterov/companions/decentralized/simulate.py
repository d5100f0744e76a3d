"""All agents in one process, in the rows of a matrix: to try settings, and to test processes.

The same equations and the same draws as between processes, so both arrive at the same points.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_ema_nesterov.companions.decentralized.agent import num_values
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

__all__ = ["Gradients", "disagreements", "simulate_docom", "simulate_sa", "simulate_storm"]

# Points, of shape (agents, size), and the index of the round -> gradients of the same shape. Called
# twice with one index, it must use the same samples.
Gradients = Callable[[Tensor, int], Tensor]
"""Returns all agents' gradients at their points in a round."""


def disagreements(
    points: list[Tensor], topology: Topology, share: float, seed: int, round_idx: int
) -> list[Tensor]:
    """Return the disagreement of every agent in one round, for each matrix of points."""
    totals = [torch.zeros_like(p) for p in points]
    size = points[0].shape[1]
    num = num_values(size, share)
    for edge_idx in topology.active_edges(seed, round_idx):
        device = points[0].device
        coordinates = draw_coordinates(size, num, seed, round_idx, edge_idx, device)
        i, j = topology.edges[edge_idx]
        for total, p in zip(totals, points, strict=True):
            ends = [p[a] if coordinates is None else p[a, coordinates] for a in (i, j)]
            add_disagreement_(total[i], ends[0], ends[1], coordinates)
            add_disagreement_(total[j], ends[1], ends[0], coordinates)
    return totals


@torch.no_grad()
def simulate_sa(
    gradients: Gradients,
    points: Tensor,
    topology: Topology,
    *,
    num_steps: int,
    lr: float,
    share: float,
    consensus_step_size: float,
    dual_step_size: float,
    dual_growth: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run FSPDA-SA; with both dual numbers 0 it is decentralized SGD on the same graphs.

    Args:
        gradients: Of each agent's loss at its point.
        points: At the start, of shape ``(agents, size)``, the same in each row.
        topology: The graph.
        num_steps: Number of rounds.
        lr: Step size alpha of the gradient.
        share: Share of the coordinates that an edge exchanges, in (0, 1].
        consensus_step_size: gamma.
        dual_step_size: eta.
        dual_growth: beta.
        seed: Of edges and coordinates.

    Returns:
        The last points and duals, each of shape ``(agents, size)``.
    """
    points, duals = points.clone(), torch.zeros_like(points)
    for round_idx in range(num_steps):
        (disagreement,) = disagreements([points], topology, share, seed, round_idx)
        correction = sa_correction_(
            duals,
            disagreement,
            consensus_step_size=consensus_step_size,
            dual_step_size=dual_step_size,
            dual_growth=dual_growth,
        )
        points = points - lr * gradients(points, round_idx) - correction
    return points, duals


@torch.no_grad()
def simulate_storm(
    gradients: Gradients,
    points: Tensor,
    topology: Topology,
    *,
    num_steps: int,
    lr: float,
    share: float,
    consensus_step_size: float,
    dual_step_size: float,
    dual_growth: float = 1.0,
    primal_weight: float = 0.01,
    dual_weight: float = 0.01,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run FSPDA-STORM. Arguments and results are those of :func:`simulate_sa`, and two weights.

    Args:
        gradients: See there; called at two points for each round.
        points: See there.
        topology: See there.
        num_steps: See there.
        lr: See there.
        share: See there.
        consensus_step_size: See there.
        dual_step_size: See there.
        dual_growth: See there.
        primal_weight: Weight a_x of the new sample, in (0, 1].
        dual_weight: Weight a_lambda of the new graph, in (0, 1].
        seed: See there.

    Returns:
        The last points and duals, each of shape ``(agents, size)``.
    """
    points, state, previous = points.clone(), StormState.zeros_like(points), None
    for round_idx in range(num_steps):
        visited = [points] if previous is None else [points, previous]
        apart = disagreements(visited, topology, share, seed, round_idx)
        steps = [lr * gradients(p, round_idx) for p in visited]
        displacement = storm_displacement_(
            state,
            (steps[0], steps[-1] if previous is not None else None),
            (apart[0], apart[-1] if previous is not None else None),
            consensus_step_size=consensus_step_size,
            dual_step_size=dual_step_size,
            dual_growth=dual_growth,
            primal_weight=primal_weight,
            dual_weight=dual_weight,
        )
        points, previous = points - displacement, points
    return points, state.duals


@torch.no_grad()
def simulate_docom(
    gradients: Gradients,
    points: Tensor,
    topology: Topology,
    *,
    num_steps: int,
    lr: float,
    share: float,
    consensus_step_size: float,
    momentum_weight: float,
) -> tuple[Tensor, Tensor]:
    """Run DoCoM with top-k messages over all edges.

    Args:
        gradients: Of each agent's loss; called at two points for each round.
        points: At the start, of shape ``(agents, size)``, the same in each row.
        topology: The graph.
        num_steps: Number of rounds.
        lr: Step size eta.
        share: Share of the coordinates in a message, in (0, 1].
        consensus_step_size: gamma.
        momentum_weight: Weight beta of the new sample, in (0, 1].

    Returns:
        The last points and trackers, each of shape ``(agents, size)``.
    """
    points, num = points.clone(), num_values(points.shape[1], share)
    hats = [CompressedGossip(p.clone(), num) for p in points]
    tracker_hats = [CompressedGossip(torch.zeros_like(p), num) for p in points]
    estimates = trackers = torch.zeros_like(points)
    previous: Tensor | None = None
    for round_idx in range(num_steps):
        fresh = gradients(points, round_idx)
        if previous is None:
            estimates = trackers = fresh
        else:
            stale = gradients(previous, round_idx)
            new = momentum_gradient(estimates, fresh, stale, momentum_weight)
            moved, estimates = trackers + (new - estimates), new
            trackers = _gossip(tracker_hats, moved, topology, consensus_step_size)
        previous = points
        points = _gossip(hats, points - lr * trackers, topology, consensus_step_size)
    return points, trackers


def _gossip(
    gossips: list[CompressedGossip], vectors: Tensor, topology: Topology, step_size: float
) -> Tensor:
    messages = [gossip.compress(v) for gossip, v in zip(gossips, vectors, strict=True)]
    weights = topology.mixing_weights()
    for agent, gossip in enumerate(gossips):
        links = topology.links(agent, tuple(range(len(topology.edges))))
        own = 1.0 - sum(weights[topology.edges[edge_idx]] for edge_idx, _ in links)
        gossip.receive(own, *messages[agent])
        for edge_idx, peer in links:
            gossip.receive(weights[topology.edges[edge_idx]], *messages[peer])
    mixed = [
        gossip.mix(v, consensus_step_size=step_size)
        for gossip, v in zip(gossips, vectors, strict=True)
    ]
    return torch.stack(mixed)
