"""APOLLO and APOLLO-Mini against their mathematics in float64, and their state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ema_nesterov.optimizers import APOLLO, groups_by_role
from tests.optimizers import projected_reference as reference
from tests.optimizers.tiny import HIDDEN, TinyLM, state_elements, train
from tests.toys import equal

Memory = dict[str, Any]


def gaussian(g: Tensor, place: int, num_refreshes: int) -> Tensor:
    """The documented draws, as a projection from the right of the tall matrix."""
    seed = place
    for _ in range(num_refreshes):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(15):
            seed = int(torch.randint(0, 2**63 - 1, (1,), generator=generator))
    is_right = g.shape[0] >= g.shape[1]
    shape = (reference.RANK, g.shape[1]) if is_right else (g.shape[0], reference.RANK)
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    drawn: Tensor = (numbers / reference.RANK**0.5).double()
    return drawn if is_right else drawn.T


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("scale_front", [False, True])
@pytest.mark.parametrize("disable_nl", [False, True])
@pytest.mark.parametrize("proj", ["random", "svd"])
def test_steps_match_the_mathematics_across_refreshes(
    scale_type: str, scale_front: bool, disable_nl: bool, proj: str
) -> None:
    def rule(g: Tensor, low: Tensor, d: Tensor, p: Tensor, memory: Memory) -> Tensor:
        factor = (
            reference.row_factors(d, low)
            if scale_type == "channel"
            else d.norm() / (low.norm() + 1e-8)
        )
        update = factor * g * (2.0 if scale_front else 1.0)
        update = update if disable_nl else reference.limited(update, memory)
        return update * (1.0 if scale_front else 2.0)

    def make(groups: list[dict[str, Any]], **kwargs: Any) -> APOLLO:
        options: dict[str, Any] = {
            "rank": 3,
            "update_proj_gap": 4,
            "scale": 4.0,
            "scale_type": scale_type,
            "scale_front": scale_front,
            "disable_nl": disable_nl,
            "proj": proj,
            "weight_decay": 0.1,
        }
        return APOLLO(groups, **{**options, **kwargs})

    found = reference.run(make)
    project = gaussian if proj == "random" else reference.singular
    wanted = reference.expected(rule, project)
    for p, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(p, w, rtol=0, atol=1e-9)
    other = reference.run(lambda groups: make(groups, disable_nl=not disable_nl))
    assert not torch.allclose(other[0], wanted[0], rtol=0, atol=1e-6)


def test_update_has_full_rank() -> None:
    p = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
    optimizer = APOLLO([{"params": [p], "role": "hidden"}], rank=2)
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype)
    optimizer.step()
    assert int(torch.linalg.matrix_rank(p.detach())) == 8


@pytest.mark.parametrize("rank", [1, 3])
def test_state_is_two_thin_moments_and_scalars(rank: int) -> None:
    model = TinyLM()
    optimizer = APOLLO(groups_by_role(model), rank=rank)
    train(model, optimizer, 2)
    for p in (model.up.weight, model.down.weight):
        assert state_elements(optimizer, p) == 2 * HIDDEN * rank
        assert {*optimizer.state[p]} == {"step", "exp_avg", "exp_avg_sq", "seed", "update_norm"}
        assert optimizer.state[p]["seed"].dtype == torch.int64


def test_each_parameter_has_a_projection_of_its_own() -> None:
    model = TinyLM()
    optimizer = APOLLO(groups_by_role(model), rank=3)
    train(model, optimizer, 1)
    seeds = [int(optimizer.state[p]["seed"]) for p in (model.up.weight, model.down.weight)]
    assert seeds == [1, 2]


def test_group_that_comes_later_counts_on() -> None:
    model = TinyLM()
    groups = groups_by_role(model)
    later = groups.pop(0)
    optimizer = APOLLO(groups, rank=3)
    train(model, optimizer, 1)
    optimizer.add_param_group(later)
    train(model, optimizer, 1)
    assert int(optimizer.state[model.up.weight]["seed"]) == 6  # five parameters were there


def test_mini_scales_each_matrix_by_one_number() -> None:
    p = torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    mini = APOLLO([{"params": [p], "role": "hidden"}], rank=1, scale_type="tensor", scale=128)
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype)
    mini.step()
    ratio = p.detach() / p.grad
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-12, atol=0)


def test_loaded_seed_is_a_whole_number_and_gives_the_same_draws() -> None:
    model, other = TinyLM(), TinyLM()
    first = APOLLO(groups_by_role(model), rank=3)
    second = APOLLO(groups_by_role(other), rank=3)
    train(model, first, 2)
    train(other, second, 2)
    second.load_state_dict(second.state_dict())
    assert second.state[other.up.weight]["seed"].dtype == torch.int64
    assert equal(train(model, first, 2, start=2), train(other, second, 2, start=2))


@pytest.mark.parametrize(
    ("option", "value"), [("proj", "pca"), ("scale_type", "row"), ("proj_type", "full")]
)
def test_unknown_words_are_errors(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be one of .* got '{value}'"):
        APOLLO(groups_by_role(TinyLM()), rank=3, **{option: value})  # type: ignore[arg-type]
