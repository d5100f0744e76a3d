"""The module's state, read and loaded by the module itself in the middle of a training step."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from tests.toys import Toy, adamw, ema_nesterov, equal, loader, make_trainer, snapshot


class Iterates(Callback):
    def __init__(self) -> None:
        self.iterates: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        self.iterates.append(snapshot(module))


class LooksInTrainingStep(Toy):
    """Copies its weights to a target network, and loads weights, in the middle of a step."""

    def __init__(self, seen: Iterates) -> None:
        super().__init__(adamw)
        self.seen, self.num_moved = seen, 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        before = self.seen.iterates[-1] if self.seen.iterates else snapshot(self)
        torch.testing.assert_close([*self.state_dict().values()], before)
        self.num_moved += not equal(snapshot(self), before)
        loss: Tensor = self(batch)
        return loss

    def on_after_backward(self) -> None:
        y = snapshot(self)
        part = self.hidden.state_dict()["weight"]
        torch.testing.assert_close(part, (self.seen.iterates or [[part]])[-1][0])
        assert equal(snapshot(self), y)
        if self.num_moved > 1:
            with pytest.raises(RuntimeError, match="must not be copied or pickled"):
                copy.deepcopy(self.hidden)


def test_the_state_in_a_training_step_is_the_iterate_and_reading_it_changes_nothing() -> None:
    plain, other = Iterates(), Iterates()
    make_trainer([ema_nesterov(), plain], max_epochs=2).fit(Toy(adamw), loader(4))
    module = LooksInTrainingStep(other)
    make_trainer([ema_nesterov(), other], max_epochs=2).fit(module, loader(4))
    assert module.num_moved == 7  # in all steps but the first
    assert all(equal(*pair) for pair in zip(plain.iterates, other.iterates, strict=True))
    assert equal(snapshot(copy.deepcopy(module)), snapshot(module))
    assert not module.hidden._state_dict_pre_hooks  # nothing of ours is left on it


class Loads(Toy):
    """Goes back to its first weights in every third training step, and takes no step there."""

    def __init__(self) -> None:
        super().__init__(adamw)
        self.start: dict[str, Tensor] = {k: v.clone() for k, v in self.state_dict().items()}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        if batch_idx % 3 < 2:
            loss: Tensor = self(batch)
            return loss
        self.load_state_dict(self.start)
        return None


def test_weights_that_a_training_step_loads_are_not_shifted() -> None:
    module, seen = Loads(), Iterates()
    make_trainer([ema_nesterov(), seen], max_epochs=1).fit(module, loader(6))
    start = [*module.start.values()]
    assert [equal(x, start) for x in seen.iterates] == [False, False, True] * 2


def test_a_trainer_can_be_pickled_after_fit() -> None:
    trainer = make_trainer(ema_nesterov(), max_epochs=1)
    trainer.fit(Toy(adamw), loader(4))
    copied = pickle.loads(pickle.dumps(trainer))
    assert equal(snapshot(copied.strategy._lightning_module), snapshot(trainer.lightning_module))
    assert repr(copied.callbacks[0]) == repr(ema_nesterov())
