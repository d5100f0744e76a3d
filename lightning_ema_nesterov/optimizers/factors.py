r"""A moving average of matrices, kept as a product of two thin factors.

.. math::

    B^+ &= (1 - h) B + h\, G A^\top (A A^\top)^{-1} \\
    A^+ &= (1 - h) A + h\, (B^\top B)^{-1} B^\top G

Both are one Newton step of size h on the squared distance of B A to G, from the old factors. The
product decays by (1 - h) squared, so that h = 1 - sqrt(beta) makes it an average with decay beta.

Replacing (B, A) by (B R, R^{-1} A) changes neither product: the gauge is free. It is used to make
the rows of A orthonormal before each update, so that A never vanishes, however long the gradients
were zero, and B = 0 is a start like any other. The inverse for B is that of the ridge problem
min ||B X - G||^2 + c^2 ||X||^2, solved by QR of B over c I: its condition number is not squared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["new_factors", "product", "update_factors_"]


def new_factors(
    shape: Sequence[int], rank: int, *, seed: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return B = 0 and an A with random orthonormal rows, in at least float32.

    Args:
        shape: Shape (p, q) of the matrix.
        rank: Rank r, at most min(p, q).
        seed: Seed of A: every process of a data-parallel run draws the same.
        like: A tensor with the device and the dtype of the parameter.

    Returns:
        B of shape (p, r) and A of shape (r, q).
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    left = torch.zeros(shape[0], rank, dtype=dtype, device=like.device)
    if like.is_meta:  # only shapes are wanted
        return left, left.new_empty(rank, shape[1])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape[1], rank, generator=generator, dtype=torch.float64)
    return left, torch.linalg.qr(drawn).Q.mT.contiguous().to(like.device, dtype)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return the average, B A."""
    return left @ right


def update_factors_(left: Tensor, right: Tensor, matrix: Tensor, *, decay: float) -> None:
    """Fold a matrix into the average, in place.

    Args:
        left: B, (p, r).
        right: A, (r, q).
        matrix: The new matrix G, (p, q), with the dtype of the factors.
        decay: Decay of the average, in [0, 1).

    Example:
        >>> left, right = torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]])
        >>> update_factors_(left, right, torch.ones(2, 2), decay=0.25)
        >>> product(left, right)
        tensor([[1.0000, 0.5000],
                [0.5000, 0.2500]])
    """
    # A^T = Q R, so that B A = (B R^T) Q^T.
    basis, mixing = torch.linalg.qr(right.mT)
    left_now = left @ mixing.mT
    step = 1.0 - decay**0.5
    right.copy_(basis.mT).lerp_(_ridge_solution(left_now, matrix), step)
    left.copy_(left_now).lerp_(matrix @ basis, step)


def _ridge_solution(left: Tensor, matrix: Tensor) -> Tensor:
    rank = left.shape[1]
    info = torch.finfo(left.dtype)
    # c^2 is the machine's precision of the mean square of B's singular values; for B = 0 it is
    # as small as lets the triangle be solved, and the solution is 0.
    mean_square = torch.linalg.vector_norm(left).square() / rank
    ridge = (info.eps * mean_square).sqrt().clamp_(min=info.tiny**0.5)
    identity = torch.eye(rank, dtype=left.dtype, device=left.device)
    columns, triangle = torch.linalg.qr(torch.cat([left, ridge * identity]))
    projected = columns[: left.shape[0]].mT @ matrix
    solution: Tensor = torch.linalg.solve_triangular(triangle, projected, upper=True)
    return solution
