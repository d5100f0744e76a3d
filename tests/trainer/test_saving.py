"""Every checkpoint holds the iterate, whoever saves it and when; and saving changes nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, model_checkpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer

from tests.toys import (
    Recorder,
    Toy,
    adamw,
    ema_nesterov,
    equal,
    loader,
    make_trainer,
    relative_error,
    sgd,
    snapshot,
)


def saved_weights(path: Path) -> list[Tensor]:
    return list(torch.load(path, weights_only=False)["state_dict"].values())


class SavesSeen(Toy):
    """Twenty-four batches, four a step; notes what each checkpoint holds, and when it was made.

    Attributes:
        saved: Steps taken, whether a window was open, and the weights.
        clock: What ModelCheckpoint reads; two hours pass in the middle of some windows.
    """

    def __init__(self) -> None:
        super().__init__(adamw)
        self.saved: list[tuple[int, bool, list[Tensor]]] = []
        self.clock = 0.0
        self.batch_idx = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.batch_idx = batch_idx
        self.log("rising", float(batch_idx))
        self.log("falling", 0.5 if batch_idx < 8 else 1.0 if batch_idx < 16 else 0.1)
        if batch_idx % 8 == 5:
            self.clock += 7200.0
        return self.forward(batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = [value.clone() for value in checkpoint["state_dict"].values()]
        is_open = self.batch_idx % 4 != 3
        self.saved.append((checkpoint["global_step"], is_open, weights))


def checkpoints(path: Path, **kwargs: Any) -> ModelCheckpoint:
    return ModelCheckpoint(path, "{step}-{epoch}", **{"save_top_k": -1, **kwargs})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every_n_train_steps": 1}, [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (6, 0)]),
        ({"every_n_train_steps": 1, "monitor": "rising", "save_top_k": 1}, [(1, 0)]),
        # A value that is not good enough is tried again at the next micro-batch.
        ({"every_n_train_steps": 2, "monitor": "falling", "save_top_k": 1}, [(2, 0), (4, 1)]),
        ({"train_time_interval": timedelta(hours=1)}, [(1, 1), (3, 1), (5, 1)]),
        ({"every_n_epochs": 1}, [(1, 1), (3, 0), (4, 1), (6, 0)]),  # after validation
    ],
    ids=["steps", "rising", "falling", "time", "validation"],
)
def test_every_trigger_of_model_checkpoint_saves_the_iterate(
    options: dict[str, Any],
    expected: list[tuple[int, int]],
    steps_of_four_batches: list[list[Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    module, undisturbed = SavesSeen(), SavesSeen()
    monkeypatch.setattr(model_checkpoint, "time", SimpleNamespace(monotonic=lambda: module.clock))
    shared: dict[str, Any] = {"max_epochs": 1, "accumulate_grad_batches": 4}
    trainer = make_trainer(
        [ema_nesterov(), checkpoints(tmp_path, **options)],
        val_check_interval=6,
        enable_checkpointing=True,
        **shared,
    )
    trainer.fit(module, loader(24), loader(1))
    assert [(step, int(is_open)) for step, is_open, _ in module.saved] == expected
    for step, _, weights in module.saved:
        # float32 training against the float64 oracle; y is 100 times farther from x.
        assert relative_error(weights, steps_of_four_batches[step]) < 1e-5
    files = sorted(tmp_path.glob("*.ckpt"))
    kept = 1 if options.get("save_top_k") == 1 else len(expected)
    assert len(files) == kept
    for path in files:
        step = torch.load(path, weights_only=False)["global_step"]
        assert relative_error(saved_weights(path), steps_of_four_batches[step]) < 1e-5
    make_trainer(ema_nesterov(), **shared).fit(undisturbed, loader(24))
    assert equal(snapshot(module), snapshot(undisturbed))


def test_save_checkpoint_between_forward_and_backward_saves_the_iterate(
    steps_of_one_batch: list[list[Tensor]], tmp_path: Path
) -> None:
    class SavesInside(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.forward(batch)
            held = snapshot(self)
            self.trainer.save_checkpoint(tmp_path / f"{batch_idx}.ckpt")
            assert equal(held, snapshot(self))
            return loss

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            seen.append(snapshot(self))  # a hook of the user's, while the checkpoint is made

    seen: list[list[Tensor]] = []
    module, undisturbed = SavesInside(adamw), Toy(adamw)
    make_trainer(ema_nesterov(), max_steps=6).fit(module, loader(6))
    for step in range(6):
        assert relative_error(seen[step], steps_of_one_batch[step]) < 1e-5
        weights = saved_weights(tmp_path / f"{step}.ckpt")
        assert relative_error(weights, steps_of_one_batch[step]) < 1e-5
    make_trainer(ema_nesterov(), max_steps=6).fit(undisturbed, loader(6))
    assert equal(snapshot(module), snapshot(undisturbed))


class Interrupted(torch.optim.SGD):
    """Calls something between the steps of its two parameters, as a signal handler does."""

    interrupt: Callable[[], None] | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is not None
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for idx, p in enumerate(group["params"]):
                if idx == 1 and self.interrupt is not None:
                    self.interrupt()
                p.add_(p.grad, alpha=-group["lr"])
        return loss


def test_signal_handler_that_saves_in_the_middle_of_a_step_saves_the_iterate(
    tmp_path: Path,
) -> None:
    """SLURM's requeue handler calls save_checkpoint at any point, also inside the optimizer."""

    class Module(Toy):
        def configure_optimizers(self) -> Optimizer:
            optimizer = Interrupted(self.parameters(), lr=5e-2)
            optimizer.interrupt = lambda: self.trainer.save_checkpoint(tmp_path / "mid.ckpt")
            return optimizer

    module, recorder = Module(sgd), Recorder("on_train_batch_end")
    make_trainer([ema_nesterov(), recorder], max_steps=4).fit(module, loader(4))
    undisturbed = Toy(sgd)
    make_trainer(ema_nesterov(), max_steps=4).fit(undisturbed, loader(4))
    # The two forms of gradient descent may round differently.
    assert relative_error(snapshot(module), snapshot(undisturbed)) < 1e-6
    first, second = saved_weights(tmp_path / "mid.ckpt")
    assert torch.equal(first, recorder.params[3][0])  # stepped before the signal
    torch.testing.assert_close(second, recorder.params[2][1])  # still to be stepped: x, not y
    assert relative_error([recorder.params[3][1]], [recorder.params[2][1]]) > 1e-3


class WritesFolders(SingleDeviceStrategy):
    """As FSDP2 saves: two files and then the table of contents, in a folder that may be there."""

    _save_distributed_checkpoint = True
    fails_at_step = -1

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        folder, step = Path(filepath), checkpoint["global_step"]
        folder.mkdir(exist_ok=True)
        for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
            if step == self.fails_at_step and name == "__1_0.distcp":
                raise OSError(errno.ENOSPC, "No space left on device")
            (folder / name).write_text(str(step))


def test_a_folder_is_replaced_when_the_next_one_is_complete(tmp_path: Path) -> None:
    """A failure in between leaves the former one, and files of others stay."""
    path, seen = tmp_path / "last.ckpt", []

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            fails = trainer.global_step == 2
            with pytest.raises(OSError, match="No space left") if fails else nullcontext():
                trainer.save_checkpoint(path)
            if trainer.global_step == 1:
                (path / "notes.txt").write_text("mine")
            seen.append([file.read_text() for file in sorted(path.iterdir())])

    strategy = WritesFolders("cpu")
    strategy.fails_at_step = 2
    trainer = make_trainer([ema_nesterov(), Saves()], max_steps=4, strategy=strategy)
    trainer.fit(Toy(sgd), loader(4))
    assert seen == [[*step * 3, "mine"] for step in "1134"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
    assert "save_checkpoint" not in vars(strategy)
