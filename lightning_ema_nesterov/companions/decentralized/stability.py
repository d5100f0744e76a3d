"""Where FSPDA stops converging: the bound on the product of its two dual step sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ema_nesterov.companions.decentralized.topology import Topology

__all__ = ["check_stability", "dual_product_bound", "mean_square_radius"]


def mean_square_radius(
    dual_product: float, consensus_step_size: float, mean: float, second_moment: float
) -> float:
    r"""Return how disagreement grows per round, in mean square; below 1 it shrinks.

    Without gradients one disagreeing direction and its dual (in units of :math:`\beta`) follow

    .. math::

        x' = x - \eta\beta\, \lambda - \gamma\, l\, x, \qquad \lambda' = \lambda + l\, x,

    with :math:`l` random, drawn anew each round. With :math:`z = (x, \lambda)` and
    :math:`z' = (A + l B) z`, the second moment :math:`E\,zz^\top` is multiplied by
    :math:`A \otimes A + E[l] (A \otimes B + B \otimes A) + E[l^2]\, B \otimes B`, of which this is
    the spectral radius.

    Args:
        dual_product: :math:`\eta\beta`, at least 0.
        consensus_step_size: :math:`\gamma`, above 0.
        mean: :math:`E[l]`, above 0.
        second_moment: :math:`E[l^2]`.

    Example:
        >>> mean_square_radius(0.001, 0.5, mean=0.0222, second_moment=0.0444) < 1
        True
        >>> mean_square_radius(0.01, 0.5, mean=0.0222, second_moment=0.0444) < 1
        False
    """
    a = torch.tensor([[1.0, -dual_product], [0.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([[-consensus_step_size, 0.0], [1.0, 0.0]], dtype=torch.float64)
    growth: Tensor = torch.kron(a, a) + mean * (torch.kron(a, b) + torch.kron(b, a))
    return float(torch.linalg.eigvals(growth + second_moment * torch.kron(b, b)).abs().max())


def dual_product_bound(topology: Topology, consensus_step_size: float, share: float) -> float:
    r"""Return the product :math:`\eta\beta` from which FSPDA diverges, in mean square.

    A round's Laplacian is a random one. Of its expectation the mean eigenvalue over the
    :math:`n - 1` disagreeing directions counts: for one edge per round and for complete graphs the
    result is exact, otherwise within 7 % of the exact one on the graphs that the tests compute.
    For one edge per round and small shares :math:`q` it is close to
    :math:`2 \gamma (1 - \gamma)\, q / (n - 1)`. A static graph must not overshoot either:
    :math:`\gamma` times its largest eigenvalue must stay below 2.

    Args:
        topology: The graph, and how many of its edges are active in a round.
        consensus_step_size: :math:`\gamma`, above 0.
        share: Share :math:`q` of the coordinates that an edge exchanges, in (0, 1].

    Returns:
        The bound; 0 where no product is stable.

    Example:
        >>> round(dual_product_bound(Topology.complete(10, one_edge_per_round=True), 0.5, 0.1), 4)
        0.0056
    """
    num_edges, num_directions = len(topology.edges), topology.num_agents - 1
    eigenvalue = 2.0 * num_edges / num_directions
    largest = float(torch.linalg.eigvalsh(topology.laplacian())[-1])
    if topology.one_edge_per_round:
        # An edge's Laplacian b b' has b'b = 2, so its square is twice itself.
        mean, largest = share * eigenvalue / num_edges, share * largest / num_edges
        second_moment = 2.0 * mean
    else:
        # Edges draw their coordinates independently: q^2 L^2 + q (1 - q) * sum of the squares.
        mean, largest = share * eigenvalue, share * largest
        second_moment = mean * (mean + 2.0 * (1.0 - share))
    if consensus_step_size * largest >= 2.0:
        return 0.0
    low, high = 0.0, consensus_step_size  # even without randomness gamma is the limit
    for _ in range(50):
        middle = (low + high) / 2
        if mean_square_radius(middle, consensus_step_size, mean, second_moment) < 1.0:
            low = middle
        else:
            high = middle
    return low


def check_stability(
    topology: Topology,
    *,
    consensus_step_size: float,
    dual_step_size: float,
    dual_growth: float,
    share: float,
) -> None:
    r"""Refuse step sizes with which FSPDA diverges.

    Args:
        topology: The graph, and how many of its edges are active in a round.
        consensus_step_size: :math:`\gamma`, above 0.
        dual_step_size: :math:`\eta`, at least 0.
        dual_growth: :math:`\beta`, at least 0.
        share: Share of the coordinates that an edge exchanges, in (0, 1].

    Raises:
        ValueError: If the product :math:`\eta\beta` is not below :func:`dual_product_bound`.
    """
    bound = dual_product_bound(topology, consensus_step_size, share)
    product = dual_step_size * dual_growth
    if product == 0.0 and bound > 0.0:
        return
    if product >= bound:
        remedy = (
            f"Choose dual_step_size below {bound / dual_growth:.3g}, best a fifth of it or less, "
            "or a larger coordinate_share."
            if bound > 0.0
            else "Choose a smaller consensus_step_size: no dual step size is stable with this one."
        )
        raise ValueError(
            f"dual_step_size * dual_growth must be below {bound:.3g} for consensus_step_size="
            f"{consensus_step_size}, coordinate_share={share} and this graph of "
            f"{topology.num_agents} agents, got {dual_step_size} * {dual_growth} = {product:.3g}: "
            f"the agents would drift apart without end. {remedy}"
        )
