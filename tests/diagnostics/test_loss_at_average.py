"""The loss at the iterate and at the average: what is logged, and that looking changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.func import functional_call

from lightning_ema_nesterov.diagnostics import LossAtAverage
from lightning_ema_nesterov.experiments.event_files import read_scalars
from tests.diagnostics.test_loss_along_direction import Talkative
from tests.toys import (
    Batches,
    Recorder,
    Toy,
    adamw,
    ema_nesterov,
    equal,
    loader,
    make_trainer,
    snapshot,
)

DECAY = 0.9


@pytest.mark.parametrize("evaluate_at", ["iterate", "average"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_are_those_at_averages_of_the_iterates(
    accumulate: int, evaluate_at: str, tmp_path: Path
) -> None:
    """Against the average of the recorded iterates in float64; validations inside windows too."""
    shares = (0.0, 0.5, 1.0)

    def run(callbacks: list[Callback]) -> tuple[list[Tensor], list[list[Tensor]]]:
        model, record = Talkative(adamw), Recorder("on_train_start", "on_train_batch_end")
        trainer = make_trainer(
            [ema_nesterov(ema_decay=DECAY, evaluate_at=evaluate_at), record, *callbacks],
            max_steps=8,
            val_check_interval=3,
            accumulate_grad_batches=accumulate,
            logger=TensorBoardLogger(tmp_path, "", version=""),
        )
        trainer.fit(model, loader(8 * accumulate), loader(3))
        by_step = {step: params for _, step, params in reversed(record.seen)}
        return snapshot(model), [by_step[step] for step in sorted(by_step)]

    final, seen = run([LossAtAverage(shares, num_batches=2)])
    scalars = read_scalars(tmp_path)
    model, batches = Toy(adamw), Batches(3).data[:2]
    names = list(dict(model.named_parameters()))
    values = []
    for share in shares:
        points = scalars[f"ema_nesterov/loss_at_average/share={share:g}"]
        assert len(points) == 8 * accumulate // 3
        for idx, point in enumerate(points):
            x, average = _average(seen[: 3 * (idx + 1) // accumulate + 1])
            moved = [(w + share * (a - w)).float() for w, a in zip(x, average, strict=True)]
            named = dict(zip(names, moved, strict=True))
            losses = [2.0 * functional_call(model, named, (batch,)) for batch in batches]
            assert point.value == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
            values.append(round(point.value, 5))
    assert len(set(values)) == len(values)
    assert equal(final, run([])[0])


def _average(iterates: list[list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    average = [w.double() for w in iterates[0]]
    for x in iterates[1:]:
        average = [DECAY * a + (1 - DECAY) * w.double() for a, w in zip(average, x, strict=True)]
    return [w.double() for w in iterates[-1]], average


def test_arguments_and_direction_are_checked() -> None:
    with pytest.raises(MisconfigurationException, match="LossAtAverage needs the direction"):
        make_trainer(LossAtAverage(), max_steps=1).fit(Toy(adamw), loader(1))
    with pytest.raises(ValueError, match="shares must not be empty"):
        LossAtAverage(())
    with pytest.raises(ValueError, match=r"shares must be in \[0, 1\]"):
        LossAtAverage((1.5,))
    with pytest.raises(ValueError, match="num_batches must be at least 1"):
        LossAtAverage(num_batches=0)
