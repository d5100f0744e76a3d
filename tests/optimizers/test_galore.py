"""GaLore against its mathematics in float64, and its state."""

from __future__ import annotations

import pytest
import torch

from lightning_ema_nesterov.optimizers import GaLore, groups_by_role
from tests.optimizers import projected_reference as reference
from tests.optimizers.tiny import HIDDEN, VOCAB, WIDTH, TinyLM, state_elements, train

SCALE = 0.25


def test_steps_match_the_mathematics_across_refreshes() -> None:
    found = reference.run(
        lambda groups: GaLore(
            groups, lr=0.01, rank=3, update_proj_gap=4, scale=SCALE, weight_decay=0.1
        )
    )
    wanted = reference.expected(lambda g, low, d, projection, _: SCALE * d @ projection)
    for p, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(p, w, rtol=0, atol=1e-9)
    # The moments are not rotated: another gap gives another result.
    other = reference.run(
        lambda groups: GaLore(groups, rank=3, update_proj_gap=5, weight_decay=0.1)
    )
    assert not torch.allclose(other[0], wanted[0], rtol=0, atol=1e-6)


def test_state_of_a_matrix() -> None:
    model = TinyLM()
    optimizer = GaLore(groups_by_role(model), rank=3)
    train(model, optimizer, 2)
    of_matrix = 2 * HIDDEN * 3 + WIDTH * 3
    assert state_elements(optimizer, model.up.weight) == of_matrix
    assert state_elements(optimizer, model.down.weight) == of_matrix
    for p in (model.wte.weight, model.lm_head.weight):
        assert state_elements(optimizer, p) == 2 * VOCAB * WIDTH


def test_published_defaults() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(128, 128))], "role": "hidden"}]
    options = GaLore(groups).param_groups[0]
    published = {"lr": 0.01, "rank": 128, "update_proj_gap": 200, "scale": 0.25, "eps": 1e-6}
    assert {key: options[key] for key in published} == published


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"update_proj_gap": 0}, "update_proj_gap must be a whole number of at least 1, got 0"),
        ({"scale": -1.0}, "scale must be at least 0"),
        ({"proj_type": "full"}, "proj_type must be one of"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be in"),
        ({"eps": -1.0}, "eps must be at least"),
    ],
)
def test_values_out_of_range_are_errors(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        GaLore(groups_by_role(TinyLM()), **{"rank": 3, **options})  # type: ignore[arg-type]
