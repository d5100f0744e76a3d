r"""DoCoM's equations for one agent: compressed gossip on the point and on the tracked gradient.

References:
    Yau, Wai, *DoCoM: Compressed Decentralized Optimization with Near-Optimal Sample Complexity*,
    TMLR 2023. https://arxiv.org/abs/2202.00255
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CompressedGossip", "momentum_gradient", "top_k"]


def top_k(vector: Tensor, num: int) -> tuple[Tensor, Tensor]:
    r"""Return the indices and values of the entries that are largest in size.

    As a compressor :math:`Q` it is contractive:
    :math:`\|Q(x) - x\|^2 \le (1 - \mathrm{num} / \mathrm{size}) \|x\|^2`.

    Args:
        vector: Of shape ``(size,)``.
        num: How many to keep, in [1, size].

    Example:
        >>> top_k(torch.tensor([1.0, -3.0, 2.0]), 1)
        (tensor([1]), tensor([-3.]))
    """
    indices = vector.abs().topk(num).indices
    return indices, vector[indices]


def momentum_gradient(
    estimate: Tensor, gradient: Tensor, previous_gradient: Tensor, weight: float
) -> Tensor:
    r"""Return the variance-reduced gradient of STORM.

    .. math::

        v_{t+1} = \nabla f(x_{t+1}; \xi) + (1 - \beta)(v_t - \nabla f(x_t; \xi))

    Args:
        estimate: :math:`v_t`.
        gradient: At the point, on the new sample.
        previous_gradient: At the previous point, on the same sample.
        weight: :math:`\beta`, in (0, 1].
    """
    return gradient + (1.0 - weight) * (estimate - previous_gradient)


class CompressedGossip:
    r"""Mix a vector with those of the neighbours while only compressed differences travel.

    Everybody keeps the public copy :math:`\hat z_i` that the messages of agent i add up to, and
    of its neighbours' only the weighted sum :math:`s_i = \sum_j W_{ij} \hat z_j`:

    .. math::

        \hat z_i &\leftarrow \hat z_i + Q(z_i - \hat z_i) \\
        z_i &\leftarrow z_i + \gamma\, (s_i - \hat z_i)

    Args:
        public: :math:`\hat z_i` at the start, **the same vector on every agent**; kept.
        num: Entries of a message, in [1, size].

    Example:
        >>> gossips = [CompressedGossip(torch.zeros(2), num=1) for _ in range(2)]
        >>> messages = [g.compress(torch.tensor([x, 0.0])) for g, x in zip(gossips, [1.0, 3.0])]
        >>> gossips[0].receive(0.5, *messages[0]), gossips[0].receive(0.5, *messages[1])
        (None, None)
        >>> gossips[0].mix(torch.tensor([1.0, 0.0]), consensus_step_size=1.0)
        tensor([2., 0.])
    """

    def __init__(self, public: Tensor, num: int) -> None:
        self.public = public
        self.mixed = public.clone()  # rows of W sum to 1
        self.num = num

    @torch.no_grad()
    def compress(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Return the agent's message on a vector, and add it to its public copy."""
        indices, values = top_k(vector - self.public, self.num)
        self.public.index_add_(0, indices, values)
        return indices, values

    @torch.no_grad()
    def receive(self, weight: float, indices: Tensor, values: Tensor) -> None:
        """Add a neighbour's message, or the agent's own, to the weighted sum."""
        self.mixed.index_add_(0, indices, values, alpha=weight)

    @torch.no_grad()
    def mix(self, vector: Tensor, *, consensus_step_size: float) -> Tensor:
        """Return the vector moved towards the neighbours' public copies."""
        return vector + consensus_step_size * (self.mixed - self.public)
