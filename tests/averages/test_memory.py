"""What an evaluation at the average holds in memory, counted by the storages of tensors."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_ema_nesterov import attach_ema_nesterov
from lightning_ema_nesterov.rules.codecs import DIRECTION_DTYPES
from tests.toys import Toy, adamw, ema_nesterov, loader, make_trainer


def bytes_held() -> int:
    """Bytes of the storages of all tensors that there are."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("direction_dtype", DIRECTION_DTYPES)
def test_one_copy_of_the_parameters_and_nothing_afterwards(direction_dtype: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    one_copy = sum(p.numel() * p.element_size() for p in net.parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    handle = attach_ema_nesterov(optimizer, net, warmup=0, rest=0, direction_dtype=direction_dtype)
    before_training = bytes_held()
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.ones(2, 256)).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    before = bytes_held()
    stored = {"float32": 1.0, "bfloat16": 0.5, "int8": 0.26}[direction_dtype]
    assert before - before_training == pytest.approx(stored * one_copy, rel=0.03)
    with handle.at_average():
        assert bytes_held() - before == one_copy
    assert bytes_held() == before


class Holds(Callback):
    """Notes what is held in each hook around evaluations."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        for hook in (
            "on_train_epoch_start",
            "on_validation_batch_end",
            "on_validation_end",
            "on_test_batch_end",
            "on_test_end",
        ):
            setattr(self, hook, self._noted(hook))

    def _noted(self, hook: str) -> Callable[..., None]:
        def note(trainer: Trainer, pl_module: LightningModule, *_: object, **__: object) -> None:
            for p in pl_module.parameters():
                p.grad = None
            self.held[hook] = bytes_held()

        return note


class Wide(Toy):
    """Parameters that are large beside a batch and what is logged."""

    def __init__(self) -> None:
        super().__init__(adamw)
        self.hidden = nn.Linear(4, 4096, bias=False)
        self.out = nn.Linear(4096, 2, bias=False)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self(batch))


@pytest.mark.slow
@pytest.mark.no_cover
def test_trainer_holds_one_copy_during_validation_and_test(tmp_path: Path) -> None:
    module = Wide()
    one_copy = sum(p.numel() * p.element_size() for p in module.parameters())
    holds = Holds()
    trainer = make_trainer([ema_nesterov(evaluate_at="average"), holds], max_epochs=2)
    trainer.fit(module, loader(4), loader(1))
    during, after = (holds.held[f"on_validation_{hook}"] for hook in ("batch_end", "end"))
    # Beside the copy there are the batch and what it logged.
    assert during - after == pytest.approx(one_copy, rel=0.02)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    for path in (None, tmp_path / "x.ckpt"):
        holds.held.clear()
        trainer.test(module, loader(1), ckpt_path=path, weights_only=False, verbose=False)
        during, after = (holds.held[f"on_test_{hook}"] for hook in ("batch_end", "end"))
        assert during - after == pytest.approx(one_copy, rel=0.02)
