"""What GaLore, Fira and APOLLO share: Adam's moments of a projected gradient."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_ema_nesterov.optimizers.adam import (
    adam_,
    count_steps_,
    step_sizes,
    unscaled_directions_,
)
from lightning_ema_nesterov.optimizers.base import (
    Group,
    LeanOptimizer,
    check_at_least,
    check_betas,
    check_rank,
    check_whole,
)
from lightning_ema_nesterov.optimizers.projector import PROJECTION_TYPES, Projector
from lightning_ema_nesterov.optimizers.shards import local, local_gradient

__all__ = ["ProjectedAdamW", "limit_norm_growth_", "norm"]

_GROWTH = 1.01


class ProjectedAdamW(LeanOptimizer):
    """AdamW with the moments of hidden matrices in a projected space, to be subclassed.

    A child turns the gradient of a matrix, its projection and Adam's direction there into the
    update. Groups of the other roles are trained by AdamW.

    Args:
        params: Groups of :func:`groups_by_role`.
        defaults: Options, among them ``lr``, ``rank``, ``update_proj_gap``, ``scale``,
            ``proj_type``, ``betas``, ``eps``, ``weight_decay``.

    Raises:
        ValueError: If an argument is out of its range; if a group has no role or no matrices, or
            hidden matrices with a side below ``rank`` or spread over processes.
    """

    needs_whole_matrices: ClassVar[bool] = True

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, {**defaults, "betas": tuple(defaults["betas"])})

    @abstractmethod
    def update_of(
        self, p: Tensor, grad: Tensor, projected: Tensor, direction: Tensor, group: Group
    ) -> Tensor:
        """Return the update of a matrix, before the step size.

        Args:
            p: The matrix, whose state holds its projection.
            grad: Its gradient, (p, q), not to be changed.
            projected: The projected gradient, (p, r) or (r, q).
            direction: Adam's direction in the projected space, shaped like ``projected``.
            group: The options of its group.
        """

    def projector_of(self, group: Group) -> Projector:
        """Return the projector of a group."""
        return Projector(
            group.get("proj", "svd"),
            rank=group["rank"],
            update_proj_gap=group["update_proj_gap"],
            proj_type=group["proj_type"],
        )

    @override
    def _check_options(self, options: Group, of: str) -> None:
        super()._check_options(options, of)
        for name in ("rank", "update_proj_gap"):
            check_whole(f"{name}{of}", options[name])
        check_at_least(f"scale{of}", options["scale"], 0.0)
        check_betas(f"betas{of}", options["betas"])
        check_at_least(f"eps{of}", options["eps"], 0.0)
        if options["proj_type"] not in PROJECTION_TYPES:
            raise ValueError(
                f"proj_type{of} must be one of {PROJECTION_TYPES}, got {options['proj_type']!r}."
            )

    @override
    def _check_group(self, group: Group, idx: int) -> None:
        super()._check_group(group, idx)
        check_rank(group, idx)

    @override
    def _update(self) -> None:
        every = [p for group in self.param_groups for p in group["params"]]
        places = {p: place for place, p in enumerate(every, start=1)}
        for group, params in self._with_gradient("hidden"):
            self._update_matrices(group, params, places)
        for group, params in self._with_gradient("embedding", "head", "other"):
            adam_(params, self.state, lr=group["lr"], betas=group["betas"], eps=group["eps"])
        for group, params in self._with_gradient("hidden", "embedding", "head", "other"):
            # After the update, with the rate that is not corrected for the start.
            self._decay_(group, params, group["lr"])

    def _update_matrices(
        self, group: Group, params: list[Tensor], places: dict[Tensor, int]
    ) -> None:
        projector = self.projector_of(group)
        grads = [local_gradient(p) for p in params]
        lows = []
        for p, grad in zip(params, grads, strict=True):
            step_idx = int(self.state[p].get("step", 0))
            projection = projector.projection(
                self.state[p], grad, step_idx=step_idx, place=places[p]
            )
            lows.append(projector.project(grad, projection))
        directions = self._directions(group, params, lows)
        steps = count_steps_(params, self.state)
        sizes = step_sizes(steps, lr=group["lr"], betas=group["betas"])
        for p, grad, low, direction, size in zip(
            params, grads, lows, directions, sizes, strict=True
        ):
            local(p).add_(self.update_of(p, grad, low, direction, group), alpha=-size)

    def _directions(self, group: Group, params: list[Tensor], lows: list[Tensor]) -> list[Tensor]:
        for p, low in zip(params, lows, strict=True):
            if "exp_avg" not in self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(low)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(low)
        moments = [[self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq")]
        return unscaled_directions_(
            lows, moments[0], moments[1], betas=group["betas"], eps=group["eps"]
        )


def norm(tensor: Tensor, dim: int | None = None) -> Tensor:
    """Return Euclidean norms in at least float32, along a dimension that is kept, or of all."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    result: Tensor = torch.linalg.vector_norm(tensor, dim=dim, keepdim=dim is not None, dtype=wide)
    return result


def limit_norm_growth_(update: Tensor, state: dict[str, Any], key: str) -> Tensor:
    """Shrink an update whose norm is above 1.01 times that of the last one, in place.

    The limited norm is kept in ``state[key]``, and the first norm as it is. A norm of zero, of a
    parameter without gradient so far, sets no limit: with the authors' rule, which has no such
    exception, the update would have to grow from 1e-8 by 1 % in a step.
    """
    size = norm(update)
    if key in state:
        limiter = (size / (state[key] + 1e-8)).clamp_(min=_GROWTH) / _GROWTH
        limiter = torch.where(state[key] > 0, limiter, torch.ones_like(limiter))
        update.div_(limiter.to(update.dtype))
        size = size / limiter
    state[key] = size
    return update
