"""A second gradient on the batch of a training step, at other weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_ema_nesterov.companions.decentralized.checks import wrapped_model
from lightning_ema_nesterov.companions.decentralized.parameters import FlatParameters

__all__ = ["SecondGradient"]


class SecondGradient:
    """Take the gradient of the current batch's loss at the point of the step before.

    The loss is ``batch_loss(batch, batch_idx)`` where the module has that method, otherwise what
    ``training_step`` returns. Around the second call random numbers are those of the first,
    buffers are restored, and what it logs is dropped.

    Args:
        trainer: Its strategy is set up with DistributedDataParallel.
        module: The module that it trains.
        parameters: Whose gradients are taken.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, parameters: FlatParameters
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._parameters = parameters
        self._gradients: list[Tensor] | None = None
        self._random_states: tuple[Tensor, Tensor | None] | None = None
        self._batch: tuple[Any, int] = (None, 0)
        # Just before the forward pass: what draws numbers earlier is no part of it.
        self._handle = wrapped_model(trainer).register_forward_pre_hook(self._remember)

    @staticmethod
    def check(module: LightningModule, name: str) -> None:
        """Raise where the loss of a batch cannot be had without a step of the optimizer."""
        if not module.automatic_optimization and not hasattr(module, "batch_loss"):
            raise MisconfigurationException(
                f"{name} takes two gradients on one batch. In manual optimization the module must "
                f"have batch_loss(batch, batch_idx) for it, which returns the loss and does not "
                f"step; {type(module).__name__} has none."
            )

    def start_batch(self, batch: Any, batch_idx: int) -> None:
        """Take a batch that the next training step will be on."""
        self._batch = (batch, batch_idx)

    def add(self, point: Tensor, share: float) -> None:
        """Add a share of the current batch's gradient at a point, once for each forward pass."""
        if self._random_states is None:
            return
        gradients = self._take(point)
        self._random_states = None
        if self._gradients is None:
            self._gradients = [g * share for g in gradients]
        else:
            for total, g in zip(self._gradients, gradients, strict=True):
                total.add_(g, alpha=share)

    def pop(self) -> list[Tensor]:
        """Return the sum since the last call; zeros if there was no gradient."""
        gradients, self._gradients = self._gradients, None
        if gradients is None:
            return [torch.zeros_like(p) for p in self._parameters.tensors]
        return gradients

    def close(self) -> None:
        """Remove the hook."""
        self._handle.remove()

    def _remember(self, module: Any, args: Any) -> None:
        if self._module.training and torch.is_grad_enabled():
            device = self._module.device
            on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            self._random_states = (torch.get_rng_state(), on_gpu)

    def _take(self, point: Tensor) -> list[Tensor]:
        params = self._parameters.tensors
        with self._repeated_forward(), self._parameters.at(point), torch.enable_grad():
            with self._trainer.precision_plugin.train_step_context():
                loss = self._loss()
            if loss is None:
                return [torch.zeros_like(p) for p in params]
            # Not backward(): gradients of the first pass stay, and nothing is reduced.
            gradients = torch.autograd.grad(loss, params, allow_unused=True)
        pairs = zip(gradients, params, strict=True)
        return [torch.zeros_like(p) if g is None else g for g, p in pairs]

    def _loss(self) -> Tensor | None:
        function = getattr(self._module, "batch_loss", self._module.training_step)
        takes_idx = len(inspect.signature(function).parameters) > 1
        output = function(*self._batch) if takes_idx else function(self._batch[0])
        loss = output.get("loss") if isinstance(output, dict) else output
        if loss is not None and not isinstance(loss, Tensor):
            raise TypeError(
                f"training_step must return a tensor, a dictionary with a loss, or None, got "
                f"{type(loss).__name__}."
            )
        return loss

    @contextmanager
    def _repeated_forward(self) -> Iterator[None]:
        module = self._module
        devices = [module.device] if module.device.type == "cuda" else []
        buffers = [(b, b.clone()) for b in module.buffers()]
        muted = {"log": _ignore, "log_dict": _ignore}
        with torch.random.fork_rng(devices):
            if self._random_states is not None:
                torch.set_rng_state(self._random_states[0])
                if self._random_states[1] is not None:
                    torch.cuda.set_rng_state(self._random_states[1], module.device)
            module.__dict__.update(muted)
            try:
                yield
            finally:
                for name in muted:
                    del module.__dict__[name]
                with torch.no_grad():
                    for buffer, before in buffers:
                        buffer.copy_(before)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Drop what the repeated pass logs: the first one logged it."""
