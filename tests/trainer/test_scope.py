"""Parameter groups with a step size of their own, in the Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset

from lightning_ema_nesterov import EMANesterov
from tests.toys import (
    Batches,
    Toy,
    ema_nesterov,
    equal,
    loader,
    make_trainer,
    relative_error,
    snapshot,
    trajectory_of,
)

NUM_STEPS = 12
HALVES = (range(6), range(6, 12))


def adamw_with(step_size: float) -> Callable[[], Toy]:
    """The toy whose second layer has a step size of its own."""

    def grouped_adamw(params: Iterable[Tensor]) -> Optimizer:
        hidden, out = params
        own: dict[str, Any] = {"params": [out], "lookahead_step_size": step_size}
        return torch.optim.AdamW([{"params": [hidden]}, own], lr=1e-2)

    return partial(Toy, grouped_adamw)


@pytest.mark.parametrize("compile", [False, True])
def test_training_matches_the_reference_and_goes_on_bitwise(compile: bool, tmp_path: Path) -> None:
    scoped = adamw_with(0.1)
    whole, resumed, path = scoped(), scoped(), tmp_path / "half.ckpt"
    make_trainer(ema_nesterov(compile=compile), max_steps=NUM_STEPS).fit(whole, loader(NUM_STEPS))
    trajectory = trajectory_of(scoped(), num_steps=NUM_STEPS, step_size=lambda _: [0.5, 0.1])
    assert relative_error(snapshot(whole), trajectory[-1]) < 1e-5  # float32 rounding
    alike = trajectory_of(scoped(), num_steps=NUM_STEPS)
    assert relative_error(alike[-1], trajectory[-1]) > 1e-3
    first, second = (
        DataLoader(Subset(Batches(NUM_STEPS), half), batch_size=None) for half in HALVES
    )
    trainer = make_trainer(ema_nesterov(compile=compile), max_epochs=1)
    trainer.fit(scoped(), first)
    trainer.save_checkpoint(path)
    trainer = make_trainer(ema_nesterov(compile=compile), max_epochs=2)
    trainer.fit(resumed, second, ckpt_path=path)
    assert equal(snapshot(resumed), snapshot(whole))


def test_value_out_of_range_is_a_misconfiguration() -> None:
    with pytest.raises(MisconfigurationException, match="of parameter group 1 must be in"):
        make_trainer(ema_nesterov(), max_steps=2).fit(adamw_with(1.5)(), loader(2))


def test_groups_alone_can_look_ahead_and_a_run_that_never_does_warns() -> None:
    """With an argument of 0 the run is no base run if a group has another step size."""
    module = adamw_with(0.5)()
    callback = ema_nesterov(lookahead_step_size=0.0)
    make_trainer(callback, max_steps=NUM_STEPS).fit(module, loader(NUM_STEPS))
    trajectory = trajectory_of(
        adamw_with(0.5)(), num_steps=NUM_STEPS, step_size=lambda _: [0.0, 0.5]
    )
    assert relative_error(snapshot(module), trajectory[-1]) < 1e-5
    with pytest.warns(UserWarning, match="never looks ahead in this run"):
        make_trainer(EMANesterov(0.0), max_steps=2).fit(adamw_with(0.0)(), loader(2))
