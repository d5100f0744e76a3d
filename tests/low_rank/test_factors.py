"""Balanced factors: the product stays, and directions follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_ema_nesterov.low_rank.factors import balance


def factors(rows: int, columns: int, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors of very unequal size, whose columns are far from orthogonal."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mix = draw(rank, rank)
    return 50.0 * draw(rows, rank) @ mix, 0.01 * draw(rank, columns)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(9, 7, 3), (5, 12, 5), (4, 4, 1)])
def test_product_stays_and_factors_are_those_of_its_singular_value_decomposition(
    rows: int, columns: int, rank: int
) -> None:
    left, right = factors(rows, columns, rank)
    found = balance(left, right)
    assert found is not None
    product = left @ right
    # A few units in the last place of the largest entry.
    assert float((found.B @ found.A - product).abs().max()) < 1e-13 * float(product.abs().max())
    values = torch.linalg.svdvals(product)[:rank]
    for gram in (found.B.mT @ found.B, found.A @ found.A.mT):
        torch.testing.assert_close(gram, torch.diag(values), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(left.mT @ left, torch.diag(values))


def test_gauge_leads_from_the_old_factors_to_the_new_ones() -> None:
    left, right = factors(9, 7, 3)
    found = balance(left, right)
    assert found is not None
    torch.testing.assert_close(left @ found.gauge, found.B, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.inverse_gauge @ right, found.A, rtol=1e-10, atol=1e-12)
    identity = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(found.gauge @ found.inverse_gauge, identity, rtol=0, atol=1e-10)
    m_left, m_right = torch.randn_like(left), torch.randn_like(right)
    for beta in (-0.3, 0.5, 1.7):
        before = (left + beta * m_left) @ (right + beta * m_right)
        after = (found.B + beta * m_left @ found.gauge) @ (
            found.A + beta * found.inverse_gauge @ m_right
        )
        torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)


def test_signs_do_not_depend_on_the_decomposition() -> None:
    left, right = factors(9, 7, 3)
    found, flipped = balance(left, right), balance(-left, -right)
    assert found is not None
    assert flipped is not None
    torch.testing.assert_close(found.B, flipped.B, rtol=1e-9, atol=1e-11)
    again = balance(found.B, found.A)  # balancing twice changes nothing more
    assert again is not None
    torch.testing.assert_close(again.B, found.B, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["zero", "dependent", "nan"])
def test_product_of_lower_rank_is_left_alone(kind: str) -> None:
    left, right = factors(9, 7, 3)
    if kind == "zero":
        left.zero_()
    elif kind == "dependent":
        left[:, 2] = left[:, 0] + left[:, 1]
    else:
        left[0, 0] = torch.nan
    assert balance(left, right) is None
