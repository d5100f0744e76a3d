"""Fira: GaLore, and the part of the gradient that it drops, scaled."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_ema_nesterov.optimizers.base import Group
from lightning_ema_nesterov.optimizers.galore import GaLore
from lightning_ema_nesterov.optimizers.projected import limit_norm_growth_, norm

__all__ = ["Fira"]


class Fira(GaLore):
    r"""Add to GaLore's update the rest of the gradient, as large as Adam makes the projected part.

    With :math:`P`, :math:`R` and :math:`D` as in :class:`GaLore`, and one factor for each row (or
    column, if the matrix is wider than high):

    .. math:: E = \frac{\lVert D_{i:} \rVert}{\lVert R_{i:} \rVert + 10^{-8}} (G - s R P), \quad
              W \leftarrow W - \eta_t (s D P + \text{limited } E)

    The norm of :math:`E` may grow by 1 % in a step; the first one is kept unlimited.

    State of a matrix: that of GaLore and the norm, one float32 number. Matrices must be whole on
    each process: train with DDP; shards are refused.

    It follows the authors' code: with a ``scale`` (their ``alpha``) other than 1, only this
    share of the projection is subtracted from the gradient, where the paper subtracts all of it.
    One departure: a zero residual sets no limit for the next one. Published values: ``lr`` 0.01,
    ``scale`` 0.25, ``update_proj_gap`` 200, ``rank`` 128 (60M), 256 (350M).

    Args:
        params: Groups of :func:`groups_by_role`.
        lr: Learning rate :math:`\eta`, at least 0.
        rank: Rank r, from 1 to the smaller side of each hidden matrix.
        update_proj_gap: Steps between two refreshes of a projection, at least 1.
        scale: Factor s, at least 0.
        proj_type: Side that is projected: ``"std"`` the smaller one, ``"reverse_std"`` the larger
            one, ``"right"``, ``"left"``.
        betas: Decays of the moments, in [0, 1).
        eps: Summand of the denominator, at least 0.
        weight_decay: Decoupled weight decay, at least 0.

    Raises:
        ValueError: If an argument is out of its range or a group does not fit.

    Example:
        >>> import torch
        >>> from lightning_ema_nesterov.optimizers import groups_by_role
        >>> layers = [torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 8)]
        >>> model = torch.nn.Sequential(*layers)
        >>> optimizer = Fira(groups_by_role(model), lr=0.01, rank=2)
        >>> model(torch.tensor([1, 2])).sum().backward()
        >>> optimizer.step()

    References:
        Chen et al., *Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?*,
        2024. https://arxiv.org/abs/2410.01623
    """

    exact_keys: ClassVar[tuple[str, ...]] = ("residual_norm",)

    @override
    def update_of(
        self, p: Tensor, grad: Tensor, projected: Tensor, direction: Tensor, group: Group
    ) -> Tensor:
        projector, projection = self.projector_of(group), self.state[p]["projection"]
        axis = projector.low_axis(grad.shape)
        factor = norm(direction, axis) / (norm(projected, axis) + 1e-8)
        inside = projector.project_back(projected, projection, grad.shape).mul_(group["scale"])
        residual = grad.sub(inside).mul_(factor.to(grad.dtype))
        limit_norm_growth_(residual, self.state[p], "residual_norm")
        back = projector.project_back(direction, projection, grad.shape)
        return residual.add_(back, alpha=group["scale"])
