"""The rule against the recursion, where a step raises, and in the Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.schedule import LookaheadSchedule
from lightning_ema_nesterov.peers.nesterov import Nesterov
from lightning_ema_nesterov.rules.last_displacement import LastDisplacement

LR, BETA, TARGET = 0.1, 0.4, 3.0


def make() -> tuple[torch.nn.Parameter, torch.optim.SGD, Lookahead]:
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=LR)
    lookahead = Lookahead(LastDisplacement(optimizer), LookaheadSchedule(BETA)).attach()
    return weight, optimizer, lookahead


def train(weight: Tensor, optimizer: torch.optim.Optimizer, lookahead: Lookahead) -> None:
    for _ in range(10):
        optimizer.zero_grad()
        lookahead.extrapolate()
        loss = (0.5 * (weight - TARGET).square()).sum()
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer.step()


def recursion(num_steps: int, beta: float = BETA) -> float:
    x = d = 0.0
    for _ in range(num_steps):
        y = x + beta * d
        x, d = y - LR * (y - TARGET), y - LR * (y - TARGET) - x
    return x


def test_steps_follow_the_recursion() -> None:
    weight, optimizer, lookahead = make()
    train(weight, optimizer, lookahead)
    assert weight.data.tolist() == pytest.approx([recursion(10)] * 2, rel=1e-12)
    assert recursion(10) != pytest.approx(recursion(10, beta=0.0), rel=1e-3)  # it does something


def test_a_step_that_raises_changes_nothing() -> None:
    weight, optimizer, lookahead = make()
    train(weight, optimizer, lookahead)
    before = weight.detach().clone(), lookahead.rule.read_direction(weight).clone()

    def fail() -> float:
        raise RuntimeError("no step")

    lookahead.extrapolate()
    assert not torch.equal(weight, before[0])  # it is at the lookahead point
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.step(fail)
    lookahead.retract()
    torch.testing.assert_close(weight.detach(), before[0], rtol=0, atol=1e-15)
    assert torch.equal(lookahead.rule.read_direction(weight), before[1])


def test_metrics_are_those_of_the_displacements() -> None:
    weight, optimizer, lookahead = make()
    train(weight, optimizer, lookahead)
    lookahead.will_measure = True
    before = weight.detach().clone()
    train(weight, optimizer, lookahead)
    assert lookahead.metrics is not None
    first_step = recursion(11) - recursion(10)
    assert lookahead.metrics.displacement_norm == pytest.approx(2**0.5 * first_step, rel=1e-6)
    assert lookahead.metrics.alignment == pytest.approx(1.0)
    assert not torch.equal(weight, before)


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        output: Tensor = self.layer(batch)
        return output.sub(batch.sum(dim=1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def weights_after(callback: Callback | None, folder: Path) -> Tensor:
    module = Regression()
    data = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    trainer = Trainer(
        max_epochs=3,
        callbacks=callback,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        accelerator="cpu",
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))  # type: ignore[arg-type]
    return module.layer.weight.detach()


@pytest.mark.filterwarnings("ignore")
def test_it_is_ema_nesterov_without_memory(tmp_path: Path) -> None:
    found = weights_after(Nesterov(BETA), tmp_path)
    same = EMANesterov(BETA, ema_decay=0.0, warmup=0, rest=0, scale_with_lr=False)
    # The two forms round differently.
    torch.testing.assert_close(found, weights_after(same, tmp_path), rtol=0, atol=1e-5)
    assert not torch.allclose(found, weights_after(None, tmp_path), rtol=0, atol=1e-3)
