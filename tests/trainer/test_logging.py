"""What is logged, of which step, and that nothing is measured where nobody asks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from tests.toys import (
    Manual,
    Recorder,
    Toy,
    adamw,
    ema_directions,
    ema_nesterov,
    loader,
    make_trainer,
    trajectory_of,
)

TAGS = ("step_size", "direction_norm", "displacement_norm", "alignment")


class Logger(CSVLogger):
    """Keeps what it is given."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seen: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, Tensor | float], step: int | None = None) -> None:
        assert step is not None
        own = {tag: float(value) for tag, value in metrics.items() if "ema_nesterov" in tag}
        if own:
            self.seen.append((step, own))


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.double().flatten() for t in tensors])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logged_values_are_those_of_the_logged_step(accumulate: int, tmp_path: Path) -> None:
    """All four, in the warmup and to the end of the rest."""
    step_sizes = [0.0] * 2 + [0.5] * 7 + [0.0] * 3
    expected = trajectory_of(
        Toy(adamw), accumulate=accumulate, num_steps=12, step_size=lambda t: step_sizes[t]
    )
    directions = ema_directions(expected)
    logger = Logger(tmp_path)
    trainer = make_trainer(
        ema_nesterov(warmup=2, rest=3),
        max_epochs=1,
        logger=logger,
        log_every_n_steps=2,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(Toy(adamw), loader(12 * accumulate))
    assert [step for step, _ in logger.seen] == [1, 3, 5, 7, 9, 11]
    for step, metrics in logger.seen:
        moved = flat(expected[step + 1]) - flat(expected[step])
        before, after = flat(directions[step]), flat(directions[step + 1])
        values = (
            step_sizes[step],
            after.norm().item(),
            moved.norm().item(),
            torch.cosine_similarity(before, moved, dim=0).item(),
        )
        named = {f"ema_nesterov/{tag}": value for tag, value in zip(TAGS, values, strict=True)}
        # Displacements are a few thousandths of the parameters, which are rounded to float32.
        assert metrics == pytest.approx(named, rel=1e-3)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_several_optimizers_are_logged_apart(tmp_path: Path) -> None:
    """Each with the displacement of its own parameter."""
    logger, recorder = Logger(tmp_path), Recorder("on_train_start", "on_train_batch_end")
    trainer = make_trainer(
        [ema_nesterov(), recorder], max_epochs=1, logger=logger, log_every_n_steps=4
    )
    trainer.fit(Manual(), loader(8))
    assert [step for step, _ in logger.seen] == [3, 7]
    for step, metrics in logger.seen:
        assert set(metrics) == {f"ema_nesterov/{tag}/{o}" for tag in TAGS for o in ("SGD", "AdamW")}
        before, after = recorder.params[step : step + 2]  # the logger counts batches
        for name, old, new in zip(("SGD", "AdamW"), before, after, strict=True):
            moved = (new.double() - old.double()).norm().item()
            assert metrics[f"ema_nesterov/displacement_norm/{name}"] == pytest.approx(
                moved, rel=1e-3
            )


@pytest.mark.parametrize("has_logger", [False, True])
def test_a_step_is_measured_only_where_a_logger_asks(has_logger: bool, tmp_path: Path) -> None:
    callback = ema_nesterov()
    asked: list[bool] = []

    def look(*_: Any) -> None:
        asked.extend(lookahead.will_measure for lookahead in callback.lookaheads)

    trainer = make_trainer(
        [callback, LambdaCallback(on_before_optimizer_step=look)],
        max_steps=4,
        log_every_n_steps=2,
        logger=Logger(tmp_path) if has_logger else False,
    )
    trainer.fit(Toy(adamw), loader(4))
    assert asked == ([False, True] * 2 if has_logger else [False] * 4)
