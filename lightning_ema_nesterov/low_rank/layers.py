"""A linear layer whose weight is a product of two thin factors, with sparse entries or without."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

__all__ = ["LowRankLinear"]


class LowRankLinear(nn.Module):
    r"""A linear layer whose weight has low rank, or is the sum of such a weight and a sparse one.

    .. math:: y = W x + b, \qquad W = \frac{\alpha}{r} B A + S

    :math:`B` is (outputs, r), :math:`A` is (r, inputs). :math:`S` is there if ``sparsity`` is above
    0: a fixed random share of the entries, which are trained.

    Without :math:`S` both factors start from Kaiming's uniform distribution, bounded by the root of
    1 over the number of columns. With it B starts at 0, A likewise, and S between
    :math:`\pm 1 / \sqrt{\text{inputs}}`. The values are those of the authors' code.

    Without :math:`S` the dense weight is never made. With it each forward pass makes it, and each
    backward pass its gradient.

    Args:
        in_features: Inputs, at least 1.
        out_features: Outputs, at least 1.
        rank: The rank r, from 1 to the smaller of both.
        alpha: Scale :math:`\alpha`, above 0.
        sparsity: Share of the entries that :math:`S` has, in [0, 1).
        bias: Whether there is a bias :math:`b`, which starts at 0.
        device: Where the tensors are.
        dtype: Their dtype.

    Attributes:
        B: Left factor, (outputs, r).
        A: Right factor, (r, inputs).
        sparse_values: Entries of :math:`S`, or ``None``.
        sparse_indices: Their places in the flattened weight, or ``None``.
        bias: The bias, (outputs,), or ``None``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> layer = LowRankLinear(6, 4, rank=2, bias=False)
        >>> layer(torch.ones(3, 6)).shape
        torch.Size([3, 4])
        >>> sum(p.numel() for p in layer.parameters())  # (6 + 4) * 2
        20

    References:
        Han et al., *SLTrain: a sparse plus low-rank approach*, 2024.
        https://arxiv.org/abs/2406.02214
    """

    sparse_indices: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float = 32.0,
        sparsity: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(in_features, out_features, rank, alpha, sparsity)
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.alpha, self.sparsity = rank, alpha, sparsity

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.B = empty(out_features, rank)
        self.A = empty(rank, in_features)
        num_sparse = round(sparsity * out_features * in_features)
        self.sparse_values = empty(num_sparse) if num_sparse else None
        indices = torch.empty(num_sparse, device=device, dtype=torch.int64) if num_sparse else None
        self.register_buffer("sparse_indices", indices)
        self.bias = empty(out_features) if bias else None
        self.reset_parameters()

    @property
    def scale(self) -> float:
        r"""The factor :math:`\alpha / r` of the product."""
        return self.alpha / self.rank

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights and the places of the sparse entries anew, in place."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if self.sparse_values is None or self.sparse_indices is None:
            nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.B)
            bound = 1.0 / math.sqrt(self.in_features)
            nn.init.uniform_(self.sparse_values, -bound, bound)
            places = torch.randperm(
                self.in_features * self.out_features, device=self.sparse_indices.device
            )
            self.sparse_indices.copy_(places[: self.sparse_indices.numel()].sort().values)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def dense_weight(self) -> Tensor:
        """Return the weight :math:`W`, (outputs, inputs), through which gradients flow."""
        product = torch.addmm(self.B.new_zeros(()), self.B, self.A, beta=0, alpha=self.scale)
        if self.sparse_values is None or self.sparse_indices is None:
            return product
        values = self.sparse_values.to(product.dtype)
        return product.flatten().index_add(0, self.sparse_indices, values).view_as(product)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, (..., outputs), of inputs of shape (..., inputs)."""
        if self.sparse_values is not None:
            return functional.linear(x, self.dense_weight(), self.bias)
        low = functional.linear(x, self.A) * self.scale
        return functional.linear(low, self.B, self.bias)

    @override
    def extra_repr(self) -> str:
        """Return what tells one layer from another."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"alpha={self.alpha}, sparsity={self.sparsity}, bias={self.bias is not None}"
        )


def _check(
    in_features: int, out_features: int, rank: object, alpha: float, sparsity: float
) -> None:
    smaller = min(in_features, out_features)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= smaller:
        raise ValueError(
            f"rank must be a whole number from 1 to the smaller side of the weight, {smaller} for "
            f"({out_features}, {in_features}), got {rank!r}."
        )
    if not alpha > 0:
        raise ValueError(f"alpha must be above 0, got {alpha!r}.")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity!r}.")
