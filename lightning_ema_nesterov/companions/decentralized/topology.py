"""Who talks to whom: graphs over agents, and what one round of a random graph uses of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Topology", "draw_coordinates", "make_topology"]


@dataclass(frozen=True)
class Topology:
    r"""A connected graph over agents, and how many of its edges are active in a round.

    Args:
        num_agents: Number of agents, at least 2. Agent ``i`` is the process of rank ``i``.
        edges: Pairs of different agents, each pair once, in any order.
        one_edge_per_round: Whether each round uses one edge, drawn uniformly, in place of all.

    Raises:
        ValueError: For fewer than two agents, for an edge that is no pair of different agents or
            is there twice, and for a graph that is not connected.

    Example:
        >>> Topology.ring(4).edges
        ((0, 1), (1, 2), (2, 3), (0, 3))
        >>> Topology(3, ((0, 1),))
        Traceback (most recent call last):
        ...
        ValueError: edges must connect all 3 agents, got no path from agent 0 to agent 2. ...
    """

    num_agents: int
    edges: tuple[tuple[int, int], ...]
    one_edge_per_round: bool = False

    def __post_init__(self) -> None:
        if self.num_agents < 2:
            raise ValueError(
                f"num_agents must be at least 2, got {self.num_agents}: one agent has nobody to "
                "talk to. Start more processes."
            )
        pairs = tuple((min(edge), max(edge)) for edge in self.edges)
        for i, j in pairs:
            if not 0 <= i < j < self.num_agents:
                raise ValueError(
                    f"edges must be pairs of different agents in [0, {self.num_agents}), "
                    f"got ({i}, {j})."
                )
        if len(set(pairs)) < len(pairs):
            raise ValueError(f"edges must contain each pair once, got {self.edges}.")
        object.__setattr__(self, "edges", pairs)
        unreached = sorted(set(range(self.num_agents)) - self._reached_from_first())
        if unreached:
            raise ValueError(
                f"edges must connect all {self.num_agents} agents, got no path from agent 0 to "
                f"agent {unreached[0]}. Without one they never agree: add edges, or draw the "
                "graph with a larger edge_probability or another seed."
            )

    @classmethod
    def ring(cls, num_agents: int, *, one_edge_per_round: bool = False) -> Topology:
        """Return the graph in which each agent knows the one before and the one after."""
        pairs = dict.fromkeys(
            (min(i, j), max(i, j))
            for i, j in ((i, (i + 1) % num_agents) for i in range(num_agents))
        )
        return cls(num_agents, tuple(pairs), one_edge_per_round)

    @classmethod
    def complete(cls, num_agents: int, *, one_edge_per_round: bool = False) -> Topology:
        """Return the graph in which each agent knows all others."""
        edges = tuple((i, j) for i in range(num_agents) for j in range(i + 1, num_agents))
        return cls(num_agents, edges, one_edge_per_round)

    @classmethod
    def erdos_renyi(
        cls, num_agents: int, probability: float, seed: int, *, one_edge_per_round: bool = False
    ) -> Topology:
        """Return a graph in which each pair is an edge with a probability, drawn once.

        Args:
            num_agents: Number of agents, at least 2.
            probability: Of each edge, in (0, 1].
            seed: Of the draw; the same on all agents.
            one_edge_per_round: Whether each round uses one edge in place of all.

        Raises:
            ValueError: If the probability is out of range, or the graph drawn is not connected.
        """
        if not 0 < probability <= 1:
            raise ValueError(f"edge_probability must be in (0, 1], got {probability}.")
        generator = torch.Generator().manual_seed(_hash(seed, "graph"))
        pairs = [(i, j) for i in range(num_agents) for j in range(i + 1, num_agents)]
        chosen = torch.rand(len(pairs), generator=generator) < probability
        edges = tuple(pair for pair, is_edge in zip(pairs, chosen.tolist(), strict=True) if is_edge)
        return cls(num_agents, edges, one_edge_per_round)

    def active_edges(self, seed: int, round_idx: int) -> tuple[int, ...]:
        """Return the indices of a round's edges; every agent computes the same ones."""
        if not self.one_edge_per_round:
            return tuple(range(len(self.edges)))
        return (_hash(seed, "edge", round_idx) % len(self.edges),)

    def links(self, agent: int, edge_idxs: tuple[int, ...]) -> list[tuple[int, int]]:
        """Return ``(edge index, peer)`` for those of the edges that an agent is at an end of."""
        pairs = [(idx, self.edges[idx]) for idx in edge_idxs]
        return [(idx, sum(edge) - agent) for idx, edge in pairs if agent in edge]

    def laplacian(self) -> Tensor:
        """Return the graph's Laplacian: float64, of shape ``(num_agents, num_agents)``."""
        laplacian = torch.zeros(self.num_agents, self.num_agents, dtype=torch.float64)
        for i, j in self.edges:
            laplacian[i, i] += 1
            laplacian[j, j] += 1
            laplacian[i, j] = laplacian[j, i] = -1
        return laplacian

    def mixing_weights(self) -> dict[tuple[int, int], float]:
        r"""Return the Metropolis weights :math:`W_{ij} = 1 / (1 + \max(d_i, d_j))` of the edges.

        With :math:`W_{ii} = 1 - \sum_j W_{ij}` they are doubly stochastic on every graph; on a
        ring of at least three all are one third.
        """
        degrees = self.laplacian().diagonal()
        return {(i, j): 1.0 / (1.0 + float(degrees[[i, j]].max())) for i, j in self.edges}

    def _reached_from_first(self) -> set[int]:
        reached = {0}
        for _ in range(self.num_agents):
            reached |= {agent for edge in self.edges if reached & set(edge) for agent in edge}
        return reached


def make_topology(
    name: str, num_agents: int, *, edges_per_round: str, edge_probability: float, seed: int
) -> Topology:
    """Return a graph by the name that a configuration file gives.

    Args:
        name: ``"ring"``, ``"complete"`` or ``"erdos_renyi"``.
        num_agents: Number of agents, at least 2.
        edges_per_round: ``"all"`` or ``"one"``.
        edge_probability: Of each edge of ``"erdos_renyi"``, in (0, 1].
        seed: Of that draw.

    Raises:
        ValueError: For an unknown name or count, and where :class:`Topology` raises.

    Example:
        >>> make_topology("complete", 3, edges_per_round="one", edge_probability=0.5, seed=0).edges
        ((0, 1), (0, 2), (1, 2))
    """
    if edges_per_round not in ("all", "one"):
        raise ValueError(f'edges_per_round must be "all" or "one", got {edges_per_round!r}.')
    is_one = edges_per_round == "one"
    if name == "ring":
        return Topology.ring(num_agents, one_edge_per_round=is_one)
    if name == "complete":
        return Topology.complete(num_agents, one_edge_per_round=is_one)
    if name == "erdos_renyi":
        return Topology.erdos_renyi(num_agents, edge_probability, seed, one_edge_per_round=is_one)
    raise ValueError(f'topology must be "ring", "complete" or "erdos_renyi", got {name!r}.')


def draw_coordinates(
    size: int, num: int, seed: int, round_idx: int, edge_idx: int, device: torch.device
) -> Tensor | None:
    """Draw the coordinates that an edge exchanges in a round; both its ends draw the same.

    Args:
        size: Number of coordinates to choose from.
        num: How many to choose, without replacement, in [1, size].
        seed: Of the run; the same on all agents.
        round_idx: Index of the round.
        edge_idx: Index of the edge in the topology.
        device: Where to draw. Kinds of devices draw differently: both ends must be of one kind.

    Returns:
        Indices, of shape ``(num,)``; ``None`` stands for all of them.
    """
    if num == size:
        return None
    generator = torch.Generator(device).manual_seed(_hash(seed, "coordinates", round_idx, edge_idx))
    return torch.randperm(size, generator=generator, device=device)[:num]


def _hash(*parts: object) -> int:
    """Seeds next to each other must not give streams that are alike."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
