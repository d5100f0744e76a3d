"""An average is that of the last step: a run that went on without the method has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_ema_nesterov import attach_ema_nesterov
from lightning_ema_nesterov.averages import average_checkpoint
from tests.toys import Manual, Toy, adamw, ema_nesterov, loader, make_trainer, snapshot

MESSAGE = r"must be that of its last step, and EMA-Nesterov took {} of its {} optimizer steps"


class Evaluated(Toy):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self(batch))


def go_on(source: Path, target: Path, *, with_method: bool, num_epochs: int = 2) -> Trainer:
    callbacks = [ema_nesterov()] if with_method else []
    trainer = make_trainer(callbacks, max_epochs=num_epochs, accumulate_grad_batches=3)
    trainer.fit(Toy(adamw), loader(12), ckpt_path=source, weights_only=False)
    trainer.save_checkpoint(target)
    return trainer


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A checkpoint of one epoch with the method: 4 optimizer steps of 3 batches."""
    trainer = make_trainer(ema_nesterov(), max_epochs=1, accumulate_grad_batches=3)
    trainer.fit(Toy(adamw), loader(12))
    trainer.save_checkpoint(tmp_path / "begun.ckpt")
    return tmp_path / "begun.ckpt"


def test_a_run_that_went_on_without_the_method_has_no_average(begun: Path, tmp_path: Path) -> None:
    stale, target = tmp_path / "stale.ckpt", tmp_path / "average.ckpt"
    go_on(begun, stale, with_method=False)
    with pytest.raises(ValueError, match=MESSAGE.format(4, 8)):
        average_checkpoint(stale, target)
    assert not target.exists()
    trainer = make_trainer(ema_nesterov(evaluate_at="average"))
    for evaluate in (trainer.validate, trainer.test):
        with pytest.raises(MisconfigurationException, match=MESSAGE.format(4, 8)):
            evaluate(Evaluated(adamw), loader(2), ckpt_path=stale, weights_only=False)
    module = Evaluated(adamw)
    with pytest.raises(MisconfigurationException, match=MESSAGE.format(4, 8)):
        trainer.predict(module, loader(2), ckpt_path=stale, weights_only=False)


def test_with_the_method_it_has_one_however_it_came_there(begun: Path, tmp_path: Path) -> None:
    stale, again = tmp_path / "stale.ckpt", tmp_path / "again.ckpt"
    go_on(begun, tmp_path / "more.ckpt", with_method=True)
    go_on(begun, stale, with_method=False)
    go_on(stale, again, with_method=True, num_epochs=3)  # begins anew there
    for source in (begun, tmp_path / "more.ckpt", again):
        average_checkpoint(source, tmp_path / f"average-{source.name}")


class Average(Callback):
    """The average of the iterates from the start of fit on, in float64."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.average = [x.double() for x in snapshot(pl_module)]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        pairs = zip(self.average, snapshot(pl_module), strict=True)
        self.average = [0.9 * a + 0.1 * x.double() for a, x in pairs]


def test_average_begins_where_the_method_does(tmp_path: Path) -> None:
    """The way to begin it later: the first steps without the callback, the others with it."""
    path, target = tmp_path / "x.ckpt", tmp_path / "average.ckpt"
    first = make_trainer(max_epochs=1)
    module = Toy(adamw)
    first.fit(module, loader(12))
    first.save_checkpoint(path)
    average, module = Average(), Toy(adamw)
    trainer = make_trainer([ema_nesterov(), average], max_epochs=2)
    trainer.fit(module, loader(12), ckpt_path=path, weights_only=False)
    trainer.save_checkpoint(path)
    average_checkpoint(path, target)
    made = torch.load(target, weights_only=False)["state_dict"]
    for found, exact, x in zip(made.values(), average.average, snapshot(module), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-7)
        assert (x - exact).norm() > 1e-2 * exact.norm()


class TwiceTheFirst(Manual):
    """The first of two optimizers steps twice as often as the second."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for optimizer in (optimizers[0], optimizers[0], optimizers[1]):
            self._step(optimizer, batch)


@pytest.mark.parametrize("before", [0, 5])
def test_steps_of_several_optimizers_are_added(tmp_path: Path, before: int) -> None:
    """Also where the first steps were without the method: an odd number, in this case."""
    path = tmp_path / "x.ckpt"
    options: dict[str, Any] = {"weights_only": False}
    if before:
        trainer = make_trainer(max_epochs=1)
        trainer.fit(TwiceTheFirst(), loader(before))
        trainer.save_checkpoint(path)
        options["ckpt_path"] = path
    trainer = make_trainer(ema_nesterov(), max_epochs=2)
    trainer.fit(TwiceTheFirst(), loader(4), **options)
    assert trainer.global_step == 3 * (before + 4 * (1 if before else 2))
    trainer.save_checkpoint(path)
    average_checkpoint(path, tmp_path / "average.ckpt")
    trainer = make_trainer(max_epochs=3)
    trainer.fit(TwiceTheFirst(), loader(4), ckpt_path=path, weights_only=False)
    trainer.save_checkpoint(path)
    with pytest.raises(ValueError, match="must be that of its last step"):
        average_checkpoint(path, tmp_path / "stale.ckpt")


def test_folder_with_numbered_parameters(tmp_path: Path) -> None:
    """As ``optimizer.state_dict()`` has them; the names are beside them."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    groups = [{"params": [*model[1].parameters()]}, {"params": [*model[0].parameters()]}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    handle = attach_ema_nesterov(optimizer, model, ema_decay=0.9, warmup=0, rest=0)
    for _ in range(5):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    with handle.at_average():
        expected = {name: p.clone() for name, p in model.state_dict().items()}
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    average_checkpoint(tmp_path / "saved", tmp_path / "average.pt")
    made = torch.load(tmp_path / "average.pt", weights_only=True)
    assert list(made) == list(expected)
    for name, average in expected.items():
        torch.testing.assert_close(made[name], average)
        assert not torch.allclose(made[name], model.state_dict()[name])


def test_folder_with_numbered_parameters_and_no_names(tmp_path: Path) -> None:
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    attach_ema_nesterov(optimizer, model, warmup=0, rest=0)
    (model(torch.ones(1, 2)) + other(torch.ones(1, 2))).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    with pytest.raises(ValueError, match="get_optimizer_state_dict"):
        average_checkpoint(tmp_path / "saved", tmp_path / "average.pt")
    assert not (tmp_path / "average.pt").exists()
