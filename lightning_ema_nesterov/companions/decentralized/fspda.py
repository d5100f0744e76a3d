r"""FSPDA's equations, for one agent's vector or for a matrix with an agent in each row.

Agents :math:`i` hold points :math:`x_i` and duals :math:`\lambda_i`. In a round some edges are
active, each on some coordinates, the same at both of its ends. That makes the random Laplacian

.. math:: [L x]_i = \sum_{j \text{ active}} M_{ij} \circ (x_i - x_j).

References:
    Yau, Wai, *Fully Stochastic Primal-dual Gradient Algorithm for Non-convex Optimization on
    Random Graphs*, 2024. https://arxiv.org/abs/2410.18774
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["StormState", "add_disagreement_", "sa_correction_", "storm_displacement_"]


@torch.no_grad()
def add_disagreement_(
    disagreement: Tensor, own: Tensor, theirs: Tensor, coordinates: Tensor | None
) -> None:
    r"""Add one active edge's :math:`M_{ij} \circ (x_i - x_j)` to :math:`[L x]_i`, in place.

    The two ends of an edge add exactly opposite numbers, so over all agents they sum to zero.

    Args:
        disagreement: The sum so far, of shape ``(size,)``.
        own: The agent's values at the coordinates, of shape ``(num,)``.
        theirs: The neighbour's values there, of the same shape.
        coordinates: Indices, each once; ``None`` for all coordinates.

    Example:
        >>> total = torch.zeros(3)
        >>> add_disagreement_(total, torch.ones(1), torch.tensor([3.0]), torch.tensor([1]))
        >>> total
        tensor([ 0., -2.,  0.])
    """
    if coordinates is None:
        disagreement.add_(own - theirs)
    else:
        disagreement.index_add_(0, coordinates, own - theirs)


@torch.no_grad()
def sa_correction_(
    duals: Tensor,
    disagreement: Tensor,
    *,
    consensus_step_size: float,
    dual_step_size: float,
    dual_growth: float,
) -> Tensor:
    r"""Return what FSPDA-SA subtracts besides the gradient step, and update the duals in place.

    .. math::

        x_i &\leftarrow x_i - \alpha \nabla f_i(x_i; \xi_i) - \eta \lambda_i - \gamma [L x]_i \\
        \lambda_i &\leftarrow \lambda_i + \beta [L x]_i

    Both lines use the same :math:`[L x]_i`, taken before the move. It is antisymmetric over each
    edge, so :math:`\sum_i \lambda_i = 0` for ever and the mean of the points follows the mean
    gradient. (A dual update with the agent's *new* point is not, and ends at a biased point.)

    Args:
        duals: :math:`\lambda`, overwritten. It starts at 0.
        disagreement: :math:`[L x]`, of the same shape.
        consensus_step_size: :math:`\gamma`.
        dual_step_size: :math:`\eta`.
        dual_growth: :math:`\beta`.

    Returns:
        :math:`\eta \lambda_i + \gamma [L x]_i`, with the duals from before the update.

    Example:
        >>> duals = torch.tensor([1.0])
        >>> sa_correction_(duals, torch.tensor([2.0]),
        ...     consensus_step_size=0.5, dual_step_size=0.1, dual_growth=1.0)
        tensor([1.1000])
        >>> duals
        tensor([3.])
    """
    correction = duals * dual_step_size + disagreement * consensus_step_size
    duals.add_(disagreement, alpha=dual_growth)
    return correction


@dataclass
class StormState:
    r"""What FSPDA-STORM keeps besides the last point; one tensor each, shaped like the points.

    Args:
        duals: :math:`\lambda`.
        primal: The variance-reduced displacement :math:`m_x`.
        dual: The variance-reduced disagreement :math:`m_\lambda`.
    """

    duals: Tensor
    primal: Tensor
    dual: Tensor

    @classmethod
    def zeros_like(cls, points: Tensor) -> StormState:
        """Return the state before the first step."""
        return cls(*(torch.zeros_like(points) for _ in range(3)))


@torch.no_grad()
def storm_displacement_(
    state: StormState,
    gradient_steps: tuple[Tensor, Tensor | None],
    disagreements: tuple[Tensor, Tensor | None],
    *,
    consensus_step_size: float,
    dual_step_size: float,
    dual_growth: float,
    primal_weight: float,
    dual_weight: float,
) -> Tensor:
    r"""Return the displacement :math:`m_x` that FSPDA-STORM subtracts, and update the state.

    .. math::

        G &= \alpha \nabla f(x_t) + \eta \lambda_t + \gamma L x_t, \quad
        G^- = \alpha \nabla f(x_{t-1}) + \eta \lambda_t + \gamma L x_{t-1} \\
        m_x &\leftarrow G + (1 - a_x)(m_x - G^-), \qquad x \leftarrow x - m_x \\
        m_\lambda &\leftarrow L x_t + (1 - a_\lambda)(m_\lambda - L x_{t-1}), \qquad
        \lambda \leftarrow \lambda + \beta\, m_\lambda

    Gradients of one step are on the same sample and disagreements on the same graph. The first
    step has no previous point: :math:`m_x = G`, :math:`m_\lambda = L x`. With both weights 1 this
    is FSPDA-SA.

    Args:
        state: Duals and averages, overwritten.
        gradient_steps: :math:`\alpha \nabla f` at the point and at the previous one.
        disagreements: :math:`L x` at the point and at the previous one.
        consensus_step_size: :math:`\gamma`.
        dual_step_size: :math:`\eta`.
        dual_growth: :math:`\beta`.
        primal_weight: :math:`a_x`, in (0, 1].
        dual_weight: :math:`a_\lambda`, in (0, 1].
    """
    step, previous_step = gradient_steps
    disagreement, previous_disagreement = disagreements
    pull = state.duals * dual_step_size
    primal = step + pull + disagreement * consensus_step_size
    dual = disagreement.clone()
    if previous_step is not None and previous_disagreement is not None:
        previous = previous_step + pull + previous_disagreement * consensus_step_size
        primal.add_(state.primal - previous, alpha=1.0 - primal_weight)
        dual.add_(state.dual - previous_disagreement, alpha=1.0 - dual_weight)
    state.primal.copy_(primal)
    state.dual.copy_(dual)
    state.duals.add_(dual, alpha=dual_growth)
    return primal
