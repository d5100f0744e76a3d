"""Small models, data and optimizers that the tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_ema_nesterov import EMANesterov
from tests.core import reference

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]


class Batches(Dataset[Tensor]):
    """Batches of inputs and targets, made from their index."""

    def __init__(self, num_batches: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(1)
        self.data = torch.randn(num_batches, 8, 6, generator=generator, dtype=torch.float64).to(
            dtype
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, idx: int) -> Tensor:
        return self.data[idx]


def loader(num_batches: int, dtype: torch.dtype = torch.float32) -> DataLoader[Tensor]:
    return DataLoader(Batches(num_batches, dtype), batch_size=None)


class Toy(LightningModule):
    """A two-layer network on random data, with the optimizer that a test asks for."""

    def __init__(
        self,
        make_optimizer: MakeOptimizer,
        *,
        dtype: torch.dtype = torch.float32,
        make_scheduler: Callable[[Optimizer], Any] | None = None,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.hidden = nn.Linear(4, 8, bias=False)
        self.out = nn.Linear(8, 2, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
        self.to(dtype)
        self.make_optimizer = make_optimizer
        self.make_scheduler = make_scheduler

    def forward(self, batch: Tensor) -> Tensor:
        inputs, targets = batch[:, :4], batch[:, 4:]
        error: Tensor = self.out(torch.tanh(self.hidden(inputs))) - targets
        return error.square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss: Tensor = self(batch)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self(batch))

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.make_scheduler(optimizer), "interval": "step"}]


def adamw(params: Iterable[Tensor]) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def sgd(params: Iterable[Tensor]) -> Optimizer:
    return torch.optim.SGD(params, lr=5e-2)


def momentum(params: Iterable[Tensor]) -> Optimizer:
    return torch.optim.SGD(params, lr=2e-2, momentum=0.9)


def muon(params: Iterable[Tensor]) -> Optimizer:
    return torch.optim.Muon(params, lr=1e-3)


def make_trainer(
    callbacks: Callback | Sequence[Callback] = (), *, max_steps: int = -1, **kwargs: Any
) -> Trainer:
    """A quiet Trainer on the CPU."""
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        **kwargs,
    }
    callbacks = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
    return Trainer(max_steps=max_steps, callbacks=callbacks, **options)


def ema_nesterov(**kwargs: Any) -> EMANesterov:
    """The callback without warmup and rest, with a decay that acts within few steps."""
    return EMANesterov(**{"ema_decay": 0.9, "warmup": 0, "rest": 0, **kwargs})


def snapshot(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are equal, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def relative_error(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    a, b = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (first, second))
    return float((a - b).norm() / b.norm())


def batch_gradients(module: Toy, batches: Tensor, accumulate: int = 1) -> reference.Gradients:
    """Gradients of the toy's loss for the oracle, averaged over each accumulation window."""
    names = [name for name, _ in module.named_parameters()]

    def gradients(params: list[Tensor], step_idx: int) -> Sequence[Tensor | None]:
        named = dict(zip(names, params, strict=True))
        window = batches[step_idx * accumulate : (step_idx + 1) * accumulate]
        with torch.enable_grad():
            losses = [functional_call(module, named, (b.to(params[0].dtype),)) for b in window]
            return torch.autograd.grad(torch.stack(losses).mean(), params)

    return gradients
