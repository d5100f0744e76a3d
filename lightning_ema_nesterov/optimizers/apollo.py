"""APOLLO and APOLLO-Mini: the raw gradient, as large as Adam would make it."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_ema_nesterov.optimizers.base import Group
from lightning_ema_nesterov.optimizers.projected import ProjectedAdamW, limit_norm_growth_, norm

__all__ = ["APOLLO"]


class APOLLO(ProjectedAdamW):
    r"""Scale the raw gradient by how much Adam scales a random projection of it.

    With a Gaussian projection :math:`P` of variance 1/r, drawn anew every ``update_proj_gap``
    steps, and one factor for each row (``scale_type="channel"``; for each column, if the matrix is
    wider than high) or one for the matrix (``"tensor"``):

    .. math:: R = G P^\top, \quad D = m(R) / (\sqrt{v(R)} + \epsilon), \quad
              W \leftarrow W - \eta_t \sqrt{s}\;
              \text{limited } \frac{\lVert D_{i:} \rVert}{\lVert R_{i:} \rVert + 10^{-8}} G_{i:}

    The norm of the limited update may grow by 1 % in a step; the first one is kept unlimited. The
    weight decay comes after, with the rate that is not corrected for the start.

    APOLLO-Mini is ``APOLLO(groups, rank=1, scale_type="tensor", scale=128)``.

    State of a matrix (p, q): 2 max(p, q) r numbers in the parameter's dtype, a norm (float32), a
    seed (int64) and a step count. The projection is not kept: it is drawn from the seed in each
    step. It must be whole on each process: train with DDP; shards are refused.

    It follows the authors' code, with the same draws (see :class:`Projector`) on the same kind of
    device. Where their paper has the scale s, the code has its root. One departure: a zero
    gradient sets no limit for the next update. Published values: ``lr`` 0.01,
    ``update_proj_gap`` 200, ``scale`` 1, ``rank`` a quarter of the width at 60M and 130M, 256
    above; Mini ``scale`` 128 (192 at 130M) with ``scale_front`` at 60M and 130M only.

    Args:
        params: Groups of :func:`groups_by_role`.
        lr: Learning rate :math:`\eta`, at least 0.
        rank: Rank r, from 1 to the smaller side of each hidden matrix.
        update_proj_gap: Steps between two projections, at least 1.
        scale: Square s of the factor of the update, at least 0.
        scale_type: ``"channel"`` or ``"tensor"``.
        scale_front: Whether the factor comes before the limit of the norm.
        disable_nl: Whether the norm may grow without limit.
        proj: ``"random"``, or ``"svd"`` for the leading singular vectors, as in GaLore, which are
            kept in the state.
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
        >>> mini = APOLLO(groups_by_role(model), rank=1, scale_type="tensor", scale=128)
        >>> model(torch.tensor([1, 2])).sum().backward()
        >>> mini.step()

    References:
        Zhu et al., *APOLLO: SGD-like Memory, AdamW-level Performance*, 2024.
        https://arxiv.org/abs/2412.05270
    """

    exact_keys: ClassVar[tuple[str, ...]] = ("seed", "update_norm")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        *,
        rank: int = 256,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        scale_type: str = "channel",
        scale_front: bool = False,
        disable_nl: bool = False,
        proj: str = "random",
        proj_type: str = "std",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "scale_type": scale_type,
            "scale_front": scale_front,
            "disable_nl": disable_nl,
            "proj": proj,
            "proj_type": proj_type,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @override
    def _check_options(self, options: Group, of: str) -> None:
        super()._check_options(options, of)
        for name, known in (("scale_type", ("channel", "tensor")), ("proj", ("random", "svd"))):
            if options[name] not in known:
                raise ValueError(f"{name}{of} must be one of {known}, got {options[name]!r}.")

    @override
    def update_of(
        self, p: Tensor, grad: Tensor, projected: Tensor, direction: Tensor, group: Group
    ) -> Tensor:
        is_by_channel = group["scale_type"] == "channel"
        axis = self.projector_of(group).low_axis(grad.shape) if is_by_channel else None
        factor = norm(direction, axis) / (norm(projected, axis) + 1e-8)
        update = grad.mul(factor.to(grad.dtype))
        root = math.sqrt(group["scale"])
        if group["scale_front"]:
            update.mul_(root)
        if not group["disable_nl"]:
            limit_norm_growth_(update, self.state[p], "update_norm")
        return update if group["scale_front"] else update.mul_(root)
