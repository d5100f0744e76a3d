"""Projections: which side, which vectors, which draws, and when they are refreshed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ema_nesterov.optimizers.projector import PROJECTION_TYPES, Projector


def gradient(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(kind: str, rank: int, proj_type: str = "std") -> Projector:
    return Projector(kind, rank=rank, update_proj_gap=3, proj_type=proj_type)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_singular_vectors_give_the_best_approximation(shape: tuple[int, int]) -> None:
    g, projector = gradient(*shape), make("svd", 2)
    projection = projector.projection({}, g, step_idx=0, place=1)
    back = projector.project_back(projector.project(g, projection), projection, g.shape)
    # Eckart and Young: the error is the norm of the dropped singular values.
    dropped = torch.linalg.svdvals(g.double())[2:].norm()
    assert float((g - back).norm()) == pytest.approx(float(dropped), rel=1e-5)
    gram = projection @ projection.mT if shape[0] >= shape[1] else projection.mT @ projection
    # Orthonormal to float32's rounding.
    torch.testing.assert_close(gram, torch.eye(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["svd", "random"])
@pytest.mark.parametrize("proj_type", PROJECTION_TYPES)
@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_side_of_each_type(kind: str, proj_type: str, shape: tuple[int, int]) -> None:
    is_tall = shape[0] > shape[1]
    is_right = {"std": is_tall, "reverse_std": not is_tall, "right": True, "left": False}[proj_type]
    g, projector = gradient(*shape), make(kind, 2, proj_type)
    projection = projector.projection({}, g, step_idx=0, place=1)
    assert projection.shape == ((2, shape[1]) if is_right else (shape[0], 2))
    low = projector.project(g, projection)
    assert low.shape == ((shape[0], 2) if is_right else (2, shape[1]))
    assert low.shape[projector.low_axis(g.shape)] == 2
    assert projector.project_back(low, projection, g.shape).shape == shape


def test_random_draws_are_the_documented_ones() -> None:
    g, projector, state = gradient(9, 5), make("random", 2), dict[str, Any]()
    seed = 7
    for refresh in range(3):
        for step_idx in range(3 * refresh, 3 * refresh + 3):
            drawn = projector.projection(state, g, step_idx=step_idx, place=7)
            numbers = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(drawn, numbers * 0.5**0.5)
            assert int(state["seed"]) == seed
        generator = torch.Generator().manual_seed(seed)
        for _ in range(15):
            seed = int(torch.randint(0, 2**63 - 1, (1,), generator=generator))


def test_random_state_is_a_seed_alone() -> None:
    state: dict[str, Any] = {}
    make("random", 2).projection(state, gradient(9, 5), step_idx=0, place=1)
    assert [*state] == ["seed"]
    assert (state["seed"].dtype, state["seed"].shape) == (torch.int64, ())


def test_random_numbers_of_the_program_are_not_touched() -> None:
    before = torch.random.get_rng_state()
    make("random", 2).projection({}, gradient(9, 5), step_idx=0, place=1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_projection_is_kept_between_refreshes() -> None:
    projector, state = make("svd", 2), dict[str, Any]()
    seen = [
        projector.projection(state, gradient(9, 5, seed=step_idx), step_idx=step_idx, place=1)
        for step_idx in range(7)
    ]
    changed = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert changed == [False, False, True, False, False, True]


def test_bfloat16_is_decomposed_in_float32() -> None:
    g = gradient(9, 5).bfloat16()
    projection = make("svd", 2).projection({}, g, step_idx=0, place=1)
    exact = make("svd", 2).projection({}, g.float(), step_idx=0, place=1)
    assert projection.dtype == torch.bfloat16
    assert torch.equal(projection, exact.bfloat16())


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_gradient_that_is_not_finite_gives_a_projection_that_is_not(shape: tuple[int, int]) -> None:
    """LAPACK would raise; a run that diverges ends as one."""
    g, projector = gradient(*shape), make("svd", 2)
    expected = projector.projection({}, g, step_idx=0, place=1).shape
    g[0, 0] = torch.inf
    found = projector.projection({}, g, step_idx=0, place=1)
    assert found.shape == expected
    assert found.isnan().all()
