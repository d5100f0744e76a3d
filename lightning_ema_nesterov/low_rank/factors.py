r"""Two thin factors of a matrix, balanced: the product stays, its singular values are split.

With the QR decompositions :math:`B = Q_B R_B` and :math:`A^\top = Q_A R_A`, and the singular value
decomposition :math:`R_B R_A^\top = U \Sigma V^\top` of an r x r matrix,

.. math::

    B A = (Q_B U)\, \Sigma\, (Q_A V)^\top, \qquad
    B' = Q_B U \Sigma^{1/2} = B G, \qquad A' = \Sigma^{1/2} V^\top Q_A^\top = G^{-1} A,

    G = R_A^\top V \Sigma^{-1/2}, \qquad G^{-1} = \Sigma^{-1/2} U^\top R_B .

No dense matrix is made. Directions follow their factors: with :math:`m_B' = m_B G` and
:math:`m_A' = G^{-1} m_A`, for every :math:`\beta`

.. math:: (B' + \beta m_B')(A' + \beta m_A') = (B + \beta m_B)(A + \beta m_A).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Balanced", "balance"]

_LEAST_RATIO = 1e-12
"""Of the smallest singular value to the largest, below which a product has a lower rank."""


@dataclass(frozen=True)
class Balanced:
    """Balanced factors, and the change of coordinates that leads to them, in float64.

    Attributes:
        B: Left factor, (p, r).
        A: Right factor, (r, q).
        gauge: What the former left factor is multiplied by from the right, (r, r).
        inverse_gauge: What the former right factor is multiplied by from the left, (r, r).
    """

    B: Tensor
    A: Tensor
    gauge: Tensor
    inverse_gauge: Tensor


def balance(left: Tensor, right: Tensor) -> Balanced | None:
    """Return balanced factors with the same product.

    Args:
        left: Left factor, (p, r), of any floating-point dtype.
        right: Right factor, (r, q), with r at most p and q.

    Returns:
        The factors in float64; ``None`` if the product has a rank below r to rounding, or is not
        finite. Balanced factors would then have a column and a row of zeros, neither of which ever
        gets a gradient again.

    Example:
        >>> found = balance(torch.tensor([[100.0], [0.0]]), torch.tensor([[0.0, 0.01]]))
        >>> found.B.norm(), found.A.norm()
        (tensor(1.0000, dtype=torch.float64), tensor(1.0000, dtype=torch.float64))
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().mT)
    core = r_left @ r_right.mT
    if not bool(core.isfinite().all()):
        return None
    u, s, vh = torch.linalg.svd(core)
    if not bool(s[-1] > _LEAST_RATIO * s[0]):
        return None
    # A decomposition leaves signs open: each row of V^T has its largest entry above 0 here, which
    # depends less on the library that computes it.
    largest = vh.gather(1, vh.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(vh.dtype)
    vh, u = vh * signs, u * signs.mT
    root = s.sqrt()
    return Balanced(
        B=(q_left @ u) * root,
        A=root[:, None] * (vh @ q_right.mT),
        gauge=(r_right.mT @ vh.mT) / root,
        inverse_gauge=(u.mT @ r_left) / root[:, None],
    )
