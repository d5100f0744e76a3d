"""Hadamard matrices, and rotations with them that take few operations."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from typing_extensions import override

__all__ = ["Rotation", "hadamard_factors"]

_LARGEST_POWER = 64


class Rotation(nn.Module):
    r"""Rotate the last dimension by a normalized Hadamard matrix, :math:`x R`.

    Where the last dimension is a multiple of ``size``, each block of it is rotated. Computed in
    float32 or wider and cast back.

    Args:
        size: Size of a block, a number for which :func:`hadamard_factors` knows a matrix.
        signs: Of +1 and -1, shape ``(size,)``, multiplied first: :math:`R = D H`. In the state
            dict, since weights are trained for them. Without random signs, the first number of
            ``x R`` is the sum of ``x``: an outlier where ``x`` is not negative.

    Raises:
        ValueError: If it knows none.

    Example:
        >>> Rotation(4)(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    signs: Tensor | None

    def __init__(self, size: int, signs: Tensor | None = None) -> None:
        super().__init__()
        self.size = size
        signs = None if signs is None else signs.to(torch.int8)
        self.register_buffer("signs", signs)
        factors = hadamard_factors(size)
        self.num_factors = len(factors)
        for idx, factor in enumerate(factors):
            # Integers: a conversion of the module to bfloat16 leaves them alone.
            self.register_buffer(f"factor_{idx}", factor, persistent=False)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` rotated, of its shape and dtype.

        Args:
            x: Its last dimension is a multiple of ``size``.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        factors = [self.get_buffer(f"factor_{idx}") for idx in range(self.num_factors)]
        wide = x.to(dtype).reshape(*x.shape[:-1], -1, self.size)
        wide = wide if self.signs is None else wide * self.signs
        blocks = wide.reshape(*wide.shape[:-1], *(len(factor) for factor in factors))
        for idx, factor in enumerate(factors):
            axis = idx - len(factors)
            blocks = (blocks.transpose(axis, -1) @ factor.to(dtype)).transpose(axis, -1)
        rotated: Tensor = blocks.reshape(x.shape) / math.sqrt(self.size)
        return rotated.to(x.dtype)


def hadamard_factors(size: int) -> list[Tensor]:
    r"""Return Hadamard matrices whose Kronecker product has the order ``size``.

    One has the smallest order :math:`K` that Paley's constructions give, where ``size`` is no power
    of two; the others are powers of two. So sizes :math:`2^k K` are possible with :math:`K` such as
    12, 20, 28, 44, 76.

    Args:
        size: Order, at least 1.

    Returns:
        Matrices of +1 and -1 in int8, not normalized.

    Raises:
        ValueError: If no such matrices are known here.

    Example:
        >>> [len(factor) for factor in hadamard_factors(4096)]
        [64, 64]
        >>> [len(factor) for factor in hadamard_factors(14336)]  # 512 * 28
        [28, 64, 8]

    References:
        Paley, *On orthogonal matrices*, 1933.
    """
    power = size & -size  # the largest power of two that divides it
    while power >= 1:
        odd = _paley(size // power)
        if odd is not None:
            factors = [odd] if len(odd) > 1 else []
            while power > 1:
                factors.append(_sylvester(min(power, _LARGEST_POWER)))
                power //= len(factors[-1])
            return factors or [torch.ones(1, 1, dtype=torch.int8)]
        power //= 2
    raise ValueError(
        f"size must be a power of two times the order of a matrix of Paley's, got {size}."
    )


def _sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.int8)
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    while len(matrix) < order:
        matrix = torch.kron(matrix, two)
    return matrix


def _paley(order: int) -> Tensor | None:
    """Return a Hadamard matrix of an order, where one of Paley's two constructions has it."""
    eye = torch.eye(order, dtype=torch.int8)
    if order == 1:
        return eye
    if order % 4 == 0 and _is_prime(order - 1):
        # q = 3 mod 4: the bordered matrix of residues is skew.
        return eye + _bordered_residues(order - 1, corner_sign=-1)
    if order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        symmetric = _bordered_residues(order // 2 - 1, corner_sign=1)
        two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
        diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
        return torch.kron(symmetric, two) + torch.kron(eye[: order // 2, : order // 2], diagonal)
    return None


def _bordered_residues(prime: int, *, corner_sign: int) -> Tensor:
    """Return [[0, 1], [sign, Q]] with Q[i, j] the quadratic character of i - j."""
    numbers = torch.arange(prime)
    character = torch.full((prime,), -1, dtype=torch.int8)
    character[numbers * numbers % prime] = 1
    character[0] = 0
    bordered = torch.zeros(prime + 1, prime + 1, dtype=torch.int8)
    bordered[0, 1:] = 1
    bordered[1:, 0] = corner_sign
    bordered[1:, 1:] = character[(numbers.unsqueeze(1) - numbers) % prime]
    return bordered


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))
