"""GaLore: AdamW on gradients that are projected to their leading singular vectors."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_ema_nesterov.optimizers.base import Group
from lightning_ema_nesterov.optimizers.projected import ProjectedAdamW

__all__ = ["GaLore"]


class GaLore(ProjectedAdamW):
    r"""Keep Adam's moments of each hidden matrix in a space of rank r of its gradient.

    With the r leading singular vectors :math:`P` of the gradient :math:`G` of every
    ``update_proj_gap``-th step, on its smaller side:

    .. math:: R = G P^\top, \quad D = m(R) / (\sqrt{v(R)} + \epsilon), \quad
              W \leftarrow W - \eta_t\, s\, D P, \quad W \leftarrow (1 - \eta\lambda) W

    where :math:`\eta_t = \eta \sqrt{1 - \beta_2^t} / (1 - \beta_1^t)`. The moments are not rotated
    when the projection changes. Embedding, head and other parameters are trained by AdamW.

    State of a matrix (p, q): 2 max(p, q) r + min(p, q) r numbers in the parameter's dtype, and a
    step count. Matrices must be whole on each process: train with DDP; shards are refused.

    It follows the authors' code: the decomposition is made in float32, epsilon is added to the
    uncorrected root, the decay comes after the update, and projections are refreshed before the
    steps 0, T, 2T of a parameter. Published values: ``lr`` 0.01, ``scale`` 0.25,
    ``update_proj_gap`` 200, ``rank`` 128, 256, 256, 1024 for 60M, 130M, 350M, 1B; no weight decay;
    7B ``lr`` 0.005, ``rank`` 1024, ``update_proj_gap`` 500, gradients clipped to 1.

    Args:
        params: Groups of :func:`groups_by_role`.
        lr: Learning rate :math:`\eta`, at least 0.
        rank: Rank r, from 1 to the smaller side of each hidden matrix.
        update_proj_gap: Steps T between two refreshes of a projection, at least 1.
        scale: Factor s of the update of hidden matrices, at least 0.
        proj_type: Side that is projected: ``"std"`` the smaller one, ``"reverse_std"`` the larger
            one, ``"right"``, ``"left"``.
        betas: Decays of the moments, in [0, 1).
        eps: Summand of the denominator, at least 0.
        weight_decay: Decoupled weight decay :math:`\lambda`, at least 0.

    Raises:
        ValueError: If an argument is out of its range or a group does not fit.

    Example:
        >>> import torch
        >>> from lightning_ema_nesterov.optimizers import groups_by_role
        >>> layers = [torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 8)]
        >>> model = torch.nn.Sequential(*layers)
        >>> optimizer = GaLore(groups_by_role(model), lr=0.01, rank=2)
        >>> model(torch.tensor([1, 2])).sum().backward()
        >>> optimizer.step()

    References:
        Zhao et al., *GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection*, 2024.
        https://arxiv.org/abs/2403.03507
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.01,
        *,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
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
            "proj_type": proj_type,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @override
    def update_of(
        self, p: Tensor, grad: Tensor, projected: Tensor, direction: Tensor, group: Group
    ) -> Tensor:
        back = self.projector_of(group).project_back(
            direction, self.state[p]["projection"], grad.shape
        )
        return back.mul_(group["scale"])
