"""Muon whose products do not depend on the kind of CPU.

torch's Muon orthogonalises a gradient by products in bfloat16. CPUs round those differently, and
differently for batches of other sizes, and the iteration amplifies small singular values by up to
3.4445 ** 5, about 500. Runs on several processes, each with a part of the batch, cannot be compared
through it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.optim import _muon

from tests.distributed.strategies import replaced


@contextmanager
def exact_products(*, is_on: bool) -> Iterator[None]:
    """Have ``torch.optim.Muon`` orthogonalise in the dtype of the gradient, where ``is_on``."""
    function = orthogonalised if is_on else vars(_muon)["_zeropower_via_newtonschulz"]
    with replaced(_muon, "_zeropower_via_newtonschulz", function):
        yield


def orthogonalised(
    gradient: Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float
) -> Tensor:
    r"""Return :math:`X_n` of :math:`X \leftarrow a X + b (X X^T) X + c (X X^T)^2 X`.

    It starts at :math:`X_0 = G / \max(\lVert G \rVert, \epsilon)`, and takes the short side left.
    """
    a, b, c = coefficients
    is_tall = gradient.shape[0] > gradient.shape[1]
    x = gradient.T if is_tall else gradient
    x = x / x.norm().clamp(min=eps)
    for _ in range(num_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    out: Tensor = x.T if is_tall else x
    return out
