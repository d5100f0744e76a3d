"""SGD with momentum at a large learning rate, with two clips."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_ema_nesterov.optimizers.base import Group, LeanOptimizer, check_fraction
from lightning_ema_nesterov.optimizers.shards import add_over_shards_, local, local_gradient

__all__ = ["ClippedSGD"]


class ClippedSGD(LeanOptimizer):
    r"""Step along the momentum with a large rate, and limit how far each tensor moves.

    .. math::

        M &\leftarrow \mu M + (1 - \mu) G \\
        D_{i:} &= M_{i:} \min(1, c / \lVert M_{i:} \rVert_2) \quad\text{(head only, else } D = M) \\
        W &\leftarrow W - \eta D \min(1, \tau / (\eta\, \mathrm{rms}(D)))

    Both clips act on the step; the momentum that is kept is never clipped. While the second one is
    active, the size of the step is :math:`\tau` whatever the schedule does: the rate decays in
    effect only once :math:`\eta\,\mathrm{rms}(D)` is below :math:`\tau`. With EMA-Nesterov's gain
    of 1 / (1 - lookahead_step_size), compare at a ``update_limit`` that is smaller by it.

    State: one number for each parameter, in the parameter's dtype.

    Sharded parameters (FSDP2, tensor parallelism) keep the rule: the squares of each tensor are
    added in one collective per step for each set of processes, with another one before it if rows
    of the head are spread. FSDP1's flat shards are refused.

    It follows the authors' code (SGD-LL): norms are at least 1e-8 and the rms at least 1e-9, the
    start is not corrected, there is no weight decay. Published values, with batches of 2048 to
    4096 x 256 tokens: ``lr`` 100, 200, 300 and ``update_limit`` 5e-4, 5e-4, 2e-4 for 130M,
    350M, 1B.

    Args:
        params: Groups of :func:`groups_by_role`.
        lr: Learning rate :math:`\eta`, at least 0. It fits a loss that is a mean over tokens.
        momentum: Weight :math:`\mu` of the past, in [0, 1); 0 keeps no state.
        update_limit: Limit :math:`\tau` of the root mean square of a tensor's update, above 0.
            ``math.inf``: no limit.
        col_thresh: Limit :math:`c` of the norm of a row of the head's step, before the rate, above
            0. ``math.inf``: no limit.

    Raises:
        ValueError: If an argument is out of its range, or a group has no role or no matrices.

    Example:
        >>> from lightning_ema_nesterov.optimizers import groups_by_role
        >>> model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
        >>> optimizer = ClippedSGD(groups_by_role(model), lr=100.0)
        >>> model(torch.tensor([1, 2])).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 100.0,
        *,
        momentum: float = 0.9,
        update_limit: float = 5e-4,
        col_thresh: float = 1e-3,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "update_limit": update_limit,
            "col_thresh": col_thresh,
        }
        super().__init__(params, defaults)

    @override
    def _check_options(self, options: Group, of: str) -> None:
        super()._check_options(options, of)
        check_fraction(f"momentum{of}", options["momentum"])
        for name in ("update_limit", "col_thresh"):
            if not options[name] > 0:
                raise ValueError(f"{name}{of} must be above 0, got {options[name]}.")

    @override
    def _update(self) -> None:
        work = [*self._with_gradient("hidden", "embedding", "head", "other")]
        params = [p for _, members in work for p in members]
        directions = {p: d for group, ps in work for p, d in self._directions(group, ps)}
        factors = self._row_factors(work, directions)
        sums = _sums_of_squares(params, directions, factors)
        squares = dict(zip(params, sums, strict=True))
        for group, members in work:
            for p in members:
                rms = squares[p].div(max(1, p.numel())).sqrt_().clamp_(min=1e-9)
                share = (group["update_limit"] / (rms * group["lr"])).clamp_(max=1.0)
                factor = share * factors[p] if p in factors else share
                step = directions[p]
                # p <- p - lr * step * factor, with no copy of the step.
                local(p).addcmul_(step, factor.to(step.dtype), value=-group["lr"])

    def _directions(self, group: Group, members: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        grads = [local_gradient(p) for p in members]
        if group["momentum"] == 0:
            return [*zip(members, grads, strict=True)]
        for p in members:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [local(self.state[p]["momentum_buffer"]) for p in members]
        torch._foreach_lerp_(buffers, grads, 1.0 - group["momentum"])
        return [*zip(members, buffers, strict=True)]

    def _row_factors(
        self, work: Sequence[tuple[Group, list[Tensor]]], directions: dict[Tensor, Tensor]
    ) -> dict[Tensor, Tensor]:
        heads = {
            p: group["col_thresh"]
            for group, members in work
            for p in members
            if group["role"] == "head" and math.isfinite(group["col_thresh"])
        }
        sums = [_norm(directions[p], dim=1).square_() for p in heads]
        add_over_shards_(sums, [*heads], [[1]] * len(heads))
        return {
            p: (limit / total.sqrt_().clamp_(min=1e-8)).clamp_(max=1.0)
            for (p, limit), total in zip(heads.items(), sums, strict=True)
        }


def _sums_of_squares(
    params: Sequence[Tensor], directions: dict[Tensor, Tensor], factors: dict[Tensor, Tensor]
) -> list[Tensor]:
    sums = []
    for p in params:
        norms = _norm(directions[p], dim=1).mul_(factors[p]) if p in factors else directions[p]
        sums.append(_norm(norms).square_())
    add_over_shards_(sums, params, [range(p.ndim) for p in params])
    return sums


def _norm(tensor: Tensor, dim: int | None = None) -> Tensor:
    # Accumulated in float32 without a copy of the tensor in float32.
    wide = torch.promote_types(tensor.dtype, torch.float32)
    result: Tensor = torch.linalg.vector_norm(tensor, dim=dim, keepdim=dim is not None, dtype=wide)
    return result
