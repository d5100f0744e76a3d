"""Small models, data and optimizers that the tests share."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import DataLoader, Dataset

from lightning_ema_nesterov import EMANesterov
from tests.core import reference

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]
MakeScheduler = Callable[[Optimizer], lr_scheduler.LRScheduler]


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
        make_scheduler: MakeScheduler | None = None,
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


class Manual(Toy):
    """Two optimizers, stepped in turn as in a GAN, with a closure or without.

    Args:
        closure: Whether ``step`` is given the forward and backward pass.
        steps: Steps of each optimizer in one training step.
        make_first: Makes the optimizer of the first layer.
        callback: Asked for the lookahead point before the second and later steps.
    """

    def __init__(
        self,
        *,
        closure: bool = False,
        steps: int = 1,
        make_first: MakeOptimizer | None = None,
        callback: EMANesterov | None = None,
    ) -> None:
        super().__init__(adamw)
        self.automatic_optimization = False
        self.make_first = make_first or sgd
        self.use_closure = closure
        self.steps = steps
        self.callback = callback

    def configure_optimizers(self) -> list[Optimizer]:
        return [self.make_first(self.hidden.parameters()), adamw(self.out.parameters())]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        # Two LightningOptimizers, which are no torch optimizers for the type checker.
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            for repeat in range(self.steps):
                if repeat and self.callback is not None:
                    self.callback.extrapolate(optimizer)
                self._step(optimizer, batch)

    def _step(self, optimizer: Any, batch: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.forward(batch)
            self.manual_backward(loss)
            return loss

        self.toggle_optimizer(optimizer)
        if self.use_closure:
            optimizer.step(closure=closure)
        else:
            closure()
            optimizer.step()
        self.untoggle_optimizer(optimizer)


class HalfStep(torch.optim.SGD):
    """Gradient descent that steps its first parameter, then fails when told to."""

    fails = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for idx, p in enumerate(group["params"]):
                if self.fails and idx == 1:
                    raise MemoryError("on purpose")
                p.add_(p.grad, alpha=-group["lr"])
        return loss


def adamw(params: Iterable[Tensor]) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def sgd(params: Iterable[Tensor]) -> Optimizer:
    return torch.optim.SGD(params, lr=5e-2)


def momentum(params: Iterable[Tensor]) -> Optimizer:
    return torch.optim.SGD(params, lr=2e-2, momentum=0.9)


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


class Recorder(Callback):
    """Copies what the parameters hold in the hooks it is told to look from.

    Attributes:
        seen: Name of the hook, ``global_step`` and the parameters, in the order of the calls.
    """

    def __init__(self, *hooks: str) -> None:
        self.seen: list[tuple[str, int, list[Tensor]]] = []
        for hook in hooks:
            setattr(self, hook, self._make(hook))

    def _make(self, hook: str) -> Callable[..., None]:
        def record(trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
            self.seen.append((hook, trainer.global_step, snapshot(pl_module)))

        return record

    @property
    def params(self) -> list[list[Tensor]]:
        """The parameters of each call."""
        return [params for _, _, params in self.seen]


def snapshot(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are equal, bit for bit."""
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))


def largest_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """Save and load a state as a checkpoint that may hold tensors only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def relative_error(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    a, b = (torch.cat([t.detach().cpu().double().flatten() for t in ts]) for ts in (first, second))
    return float((a - b).norm() / b.norm())


def trajectory_of(
    module: Toy, *, accumulate: int = 1, num_steps: int, **kwargs: Any
) -> list[list[Tensor]]:
    """The oracle's iterates for the toy's data, in float64 unless ``dtype`` says otherwise."""
    batches = Batches(num_steps * accumulate, torch.float64).data
    trajectory, _ = reference.train(
        snapshot(module),
        batch_gradients(module, batches, accumulate),
        module.make_optimizer,
        num_steps=num_steps,
        **{"ema_decay": 0.9, "step_size": lambda _: 0.5, **kwargs},
    )
    return trajectory


def ema_directions(
    iterates: Sequence[Sequence[Tensor]], ema_decay: float = 0.9
) -> list[list[Tensor]]:
    """The recursion of the EMA direction over iterates that were seen, in float64."""
    m = [torch.zeros_like(x, dtype=torch.float64) for x in iterates[0]]
    directions = [m]
    for before, after in pairwise(iterates):
        rows = zip(m, before, after, strict=True)
        m = [ema_decay * d + (1 - ema_decay) * (b.double() - a.double()) for d, a, b in rows]
        directions.append(m)
    return directions


def lookahead_point(
    iterate: Sequence[Tensor], direction: Sequence[Tensor], step_size: float = 0.5
) -> list[Tensor]:
    return [x.double() + step_size * m for x, m in zip(iterate, direction, strict=True)]


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
