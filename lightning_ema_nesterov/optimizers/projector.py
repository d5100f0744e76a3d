"""Projections of a gradient to a few dimensions of its smaller side, and back."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["PROJECTION_TYPES", "Projector"]

PROJECTION_TYPES = ("std", "reverse_std", "right", "left")
"""Which side of a matrix is projected, in the words of GaLore's authors."""

_FIFTEENTH = 15


class Projector:
    r"""Project matrices of shape (p, q) to r dimensions, with tensors as the only state.

    From the right, :math:`R = G P^\top` has shape (p, r) and :math:`R P` leads back, with
    :math:`P` of shape (r, q). From the left, :math:`R = P^\top G` has shape (r, q) and
    :math:`P R` leads back, with :math:`P` of shape (p, r).

    What is kept in a parameter's state: with ``"svd"`` the ``projection``, the leading singular
    vectors of the gradient at the last refresh, computed in float32 and kept in the parameter's
    dtype; with ``"random"`` the ``seed`` alone, an int64 scalar on the CPU, from which the
    projection, Gaussian numbers with variance 1/r, is drawn anew in each step.

    A parameter's first seed is its place among all parameters of the optimizer, counted from 1. At
    a refresh the next seed is the fifteenth of the whole numbers below 2^63 - 1 that a generator on
    the CPU with the last seed gives. These are the draws of the authors' package.

    Args:
        kind: ``"svd"`` or ``"random"``.
        rank: Dimensions r, at least 1.
        update_proj_gap: Steps of a parameter between two refreshes, at least 1: a refresh comes
            before its steps 0, ``update_proj_gap``, 2 ``update_proj_gap`` and so on.
        proj_type: Side that is projected: ``"std"`` the smaller one (from the right if p >= q),
            ``"reverse_std"`` the larger one, ``"right"`` or ``"left"`` always the same.

    Example:
        >>> state = {}
        >>> gradient = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> projector = Projector("svd", rank=1, update_proj_gap=200)
        >>> projection = projector.projection(state, gradient, step_idx=0, place=1)
        >>> low = projector.project(gradient, projection)
        >>> projector.project_back(low, projection, gradient.shape)
        tensor([[3., 0.],
                [0., 0.],
                [0., 0.]])
    """

    def __init__(
        self, kind: str, *, rank: int, update_proj_gap: int, proj_type: str = "std"
    ) -> None:
        self.kind = kind
        self.rank = rank
        self.update_proj_gap = update_proj_gap
        self.proj_type = proj_type

    def is_right(self, shape: torch.Size) -> bool:
        """Whether a matrix of this shape is projected from the right."""
        if self.proj_type == "std":
            return shape[0] >= shape[1]
        if self.proj_type == "reverse_std":
            return shape[0] < shape[1]
        return self.proj_type == "right"

    def projection(
        self, state: MutableMapping[str, Any], gradient: Tensor, *, step_idx: int, place: int
    ) -> Tensor:
        """Return the projection for a step, refreshed in the state if its time has come.

        Args:
            state: The parameter's state, where ``projection`` or ``seed`` is kept.
            gradient: The whole gradient.
            step_idx: Steps that the parameter took before.
            place: Place of the parameter in its optimizer, counted from 1.
        """
        is_due = step_idx % self.update_proj_gap == 0
        if self.kind == "svd":
            if is_due or "projection" not in state:
                state["projection"] = self._singular_vectors(gradient)
            projection: Tensor = state["projection"]
            return projection
        if "seed" not in state:
            state["seed"] = torch.tensor(place)
        elif is_due:
            state["seed"] = _next_seed(int(state["seed"]))
        elif state["seed"].device.type != "cpu":
            state["seed"] = state["seed"].cpu()  # trainers move a loaded state to the device
        return self._random(gradient, int(state["seed"]))

    def project(self, gradient: Tensor, projection: Tensor) -> Tensor:
        """Return the projected gradient, (p, r) or (r, q)."""
        if self.is_right(gradient.shape):
            return gradient @ projection.mT
        return projection.mT @ gradient

    def project_back(self, low: Tensor, projection: Tensor, shape: torch.Size) -> Tensor:
        """Return the matrix of the given shape that a projected one stands for."""
        return low @ projection if self.is_right(shape) else projection @ low

    def low_axis(self, shape: torch.Size) -> int:
        """Return the dimension of a projected gradient that has only r entries."""
        return int(self.is_right(shape))

    def _singular_vectors(self, gradient: Tensor) -> Tensor:
        if not gradient.is_meta and not gradient.isfinite().all():
            return gradient.new_full(self._shape(gradient), math.nan)  # LAPACK would raise
        left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
        kept = right[: self.rank] if self.is_right(gradient.shape) else left[:, : self.rank]
        # A copy: a view would keep all singular vectors alive, and in a checkpoint.
        copy: Tensor = kept.to(gradient.dtype).clone(memory_format=torch.contiguous_format)
        return copy

    def _random(self, gradient: Tensor, seed: int) -> Tensor:
        shape = self._shape(gradient)
        if gradient.is_meta:  # which has no generator: only shapes are wanted
            return gradient.new_empty(shape)
        generator = torch.Generator(gradient.device).manual_seed(seed)
        drawn = torch.randn(shape, generator=generator, device=gradient.device)
        return (drawn / math.sqrt(self.rank)).to(gradient.dtype)

    def _shape(self, gradient: Tensor) -> tuple[int, int]:
        rows, columns = gradient.shape
        return (self.rank, columns) if self.is_right(gradient.shape) else (rows, self.rank)


def _next_seed(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    limit = torch.iinfo(torch.int64).max
    return torch.randint(0, limit, (_FIFTEENTH,), generator=generator)[-1].clone()
