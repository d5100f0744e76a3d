"""SCALE: gradients normalized by rows, with momentum on the head only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_ema_nesterov.optimizers.adam import adam_
from lightning_ema_nesterov.optimizers.base import (
    Group,
    LeanOptimizer,
    check_at_least,
    check_betas,
    check_fraction,
)
from lightning_ema_nesterov.optimizers.shards import add_over_shards_, local, local_gradient

__all__ = ["SCALE"]

_FLOOR = 1e-8


class SCALE(LeanOptimizer):
    r"""Normalize the gradient of each matrix, and keep momentum for the head alone.

    With gradient :math:`G` of a matrix of shape (outputs, inputs), and rms the root of the mean
    square, at least 1e-8:

    .. math::

        \text{hidden:} \quad & U_{ij} = G_{ij} / \mathrm{rms}_j(G_{ij}) \\
        \text{embedding:} \quad & U_{ij} = G_{ij} / \mathrm{rms}_i(G_{ij}) \\
        \text{head:} \quad & M \leftarrow \mu M + (1 - \mu) G, \quad
                     U_{ij} = M_{ij} / \mathrm{rms}_j(M_{ij}) \\
        & W \leftarrow (1 - \eta\lambda) W - \eta U

    So each output of a hidden layer, each feature of the embedding and each token of the head is
    moved by a root mean square of :math:`\eta` in a step. All other parameters are trained by AdamW
    with the rate :math:`\eta` times ``adam_lr / lr``.

    State: the head's momentum and two numbers for each entry of the other parameters, in the
    parameter's dtype, and a step count for each of the latter. Nothing for hidden matrices and
    embedding.

    Sharded matrices (FSDP2, tensor parallelism) keep the rule. Rows that are whole on a process are
    local; the embedding's sums over a vocabulary that is spread, and rows that are spread, are
    added in one collective per step for each set of processes. FSDP1's flat shards are refused.

    It follows the authors' code. The paper's norm is the Euclidean one, which is larger by
    the root of the row's length: a rate from its formula is not a rate here. Epsilon is added to
    AdamW's uncorrected root. Published values: batches of 512 x 256 tokens, no weight decay, no
    clipping; ``lr`` 1e-3 (60M to 350M), 2e-4 (1B), 1e-4 (7B); ``adam_lr`` 2e-2 up to 350M, else
    1e-3.

    Args:
        params: Groups of :func:`groups_by_role`.
        lr: Learning rate :math:`\eta`, at least 0: the size of an update, as with Adam.
        momentum: Weight :math:`\mu` of the past in the head's momentum, in [0, 1).
        adam_lr: Learning rate of the other parameters at ``lr``, at least 0. It is kept as a ratio
            (``group["adam_lr_ratio"]``), so that a schedule may set one rate for all groups.
            Default: ``lr``.
        adamw_betas: Decays of AdamW's moments, in [0, 1).
        adamw_eps: Summand of AdamW's denominator, at least 0.
        weight_decay: Decoupled weight decay :math:`\lambda`, at least 0, of all parameters.

    Raises:
        ValueError: If an argument is out of its range, or a group has no role or no matrices.

    Example:
        >>> from lightning_ema_nesterov.optimizers import groups_by_role
        >>> model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
        >>> optimizer = SCALE(groups_by_role(model), lr=1e-3)
        >>> model(torch.tensor([1, 2])).sum().backward()
        >>> optimizer.step()

    References:
        Glentis et al., *A Minimalist Optimizer Design for LLM Pretraining*, 2025.
        https://arxiv.org/abs/2506.16659
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        adam_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if adam_lr is not None and not (lr > 0 and adam_lr >= 0):
            raise ValueError(
                f"adam_lr must be at least 0 and lr above 0, of which it is a multiple, got "
                f"adam_lr {adam_lr} and lr {lr}."
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "adam_lr_ratio": 1.0 if adam_lr is None else adam_lr / lr,
            "adamw_betas": tuple(adamw_betas),
            "adamw_eps": adamw_eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @override
    def _check_options(self, options: Group, of: str) -> None:
        super()._check_options(options, of)
        check_fraction(f"momentum{of}", options["momentum"])
        check_betas(f"adamw_betas{of}", options["adamw_betas"])
        check_at_least(f"adamw_eps{of}", options["adamw_eps"], 0.0)
        check_at_least(f"adam_lr_ratio{of}", options["adam_lr_ratio"], 0.0)

    @override
    def _update(self) -> None:
        matrices = [*self._with_gradient("hidden", "embedding", "head")]
        params = [p for _, members in matrices for p in members]
        dims = [int(group["role"] != "embedding") for group, members in matrices for _ in members]
        directions = [self._direction(group, p) for group, members in matrices for p in members]
        scales = dict(zip(params, _rms(directions, params, dims), strict=True))
        moved = dict(zip(params, directions, strict=True))
        for group, members in matrices:
            self._decay_(group, members, group["lr"])
            own = [local(p) for p in members]
            torch._foreach_addcdiv_(
                own, [moved[p] for p in members], [scales[p] for p in members], -float(group["lr"])
            )
        for group, members in self._with_gradient("other"):
            lr = group["lr"] * group["adam_lr_ratio"]
            self._decay_(group, members, lr)
            betas, eps = group["adamw_betas"], group["adamw_eps"]
            adam_(members, self.state, lr=lr, betas=betas, eps=eps)

    def _direction(self, group: Group, p: Tensor) -> Tensor:
        grad = local_gradient(p)
        if group["role"] != "head":
            return grad
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return local(self.state[p]["momentum_buffer"]).lerp_(grad, 1.0 - group["momentum"])


def _rms(
    directions: Sequence[Tensor], params: Sequence[Tensor], dims: Sequence[int]
) -> list[Tensor]:
    """Return root mean squares along one dimension of each whole matrix, at least the floor."""
    sums = []
    for direction, dim in zip(directions, dims, strict=True):
        # Accumulated in float32 without a copy of the gradient in float32.
        wide = torch.promote_types(direction.dtype, torch.float32)
        sums.append(
            torch.linalg.vector_norm(direction, dim=dim, keepdim=True, dtype=wide).square_()
        )
    add_over_shards_(sums, params, [[dim] for dim in dims])
    return [
        total.div_(p.shape[dim]).sqrt_().clamp_(min=_floor_in(direction.dtype)).to(direction.dtype)
        for total, p, dim, direction in zip(sums, params, dims, directions, strict=True)
    ]


def _floor_in(dtype: torch.dtype) -> float:
    """Return the floor, or the least number above 0 where the dtype has none as small."""
    info = torch.finfo(dtype)
    return max(_FLOOR, info.tiny * info.eps)
