"""Diagnostics that show what EMA-Nesterov relies on, during any run of the Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_ema_nesterov.callback import EMANesterov
from lightning_ema_nesterov.lookahead import Lookahead
from lightning_ema_nesterov.sharding import local

__all__ = ["LossAlongDirection", "TrajectorySpectrum"]


class LossAlongDirection(Callback):
    r"""Log the loss at :math:`x + a\, m` for a few :math:`a`, after each validation.

    The loss is that of ``training_step`` on the first validation batches, in evaluation mode and
    without gradients; what ``training_step`` logs there is dropped. Along a one-step direction
    (``ema_decay=0``) it climbs steeply. Along an EMA direction it falls where the direction holds
    progress, as early in a run, and climbs a little where it holds noise. For the time of the
    measurement a copy of the parameters is kept.

    Logged as ``ema_nesterov/loss_along/a=...``: the loss there minus that at :math:`x`, in the unit
    of the loss. :math:`a` counts steps: :math:`m` is a parameter change per step.

    Args:
        distances: Values of :math:`a`.
        num_batches: Validation batches to take the mean loss over, at least 1.

    Raises:
        ValueError: If ``num_batches`` is below 1 or there are no ``distances``.
        MisconfigurationException: When fit starts, without an EMANesterov callback.
    """

    def __init__(
        self, distances: Sequence[float] = (0.5, 2.0, 10.0, 50.0), num_batches: int = 1
    ) -> None:
        if num_batches < 1 or not distances:
            raise ValueError(
                f"distances must not be empty and num_batches at least 1, got {distances!r} and "
                f"{num_batches}."
            )
        self.distances = tuple(distances)
        self.num_batches = num_batches
        self._batches: list[Any] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is a direction."""
        _ema_nesterov_of(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the batches of the last validation."""
        self._batches = []

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first batches."""
        if len(self._batches) < self.num_batches:
            self._batches.append(batch)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log."""
        if trainer.sanity_checking or not trainer.loggers:
            return
        pairs = [
            (lookahead, p)
            for lookahead in _ema_nesterov_of(trainer).lookaheads
            for p in lookahead.method.known_params()
        ]
        if not pairs:
            return
        kept = [p.detach().clone() for _, p in pairs]
        try:
            with _silenced(pl_module), torch.no_grad():
                losses = [self._loss_at(a, trainer, pairs, kept) for a in (0.0, *self.distances)]
        finally:
            _set(pairs, kept)  # bit for bit: training goes on as if nobody had looked
        gaps = {
            f"ema_nesterov/loss_along/a={a:g}": loss - losses[0]
            for a, loss in zip(self.distances, losses[1:], strict=True)
        }
        _log(trainer, gaps)

    def _loss_at(
        self,
        a: float,
        trainer: Trainer,
        pairs: Sequence[tuple[Lookahead, Tensor]],
        kept: Sequence[Tensor],
    ) -> float:
        _set(pairs, kept)
        for lookahead, p in pairs:
            [point] = local([p.data])
            point.add_(lookahead.method.read(p), alpha=a)
        losses = [_loss_of(trainer, batch, idx) for idx, batch in enumerate(self._batches)]
        mean = trainer.strategy.reduce(torch.stack(losses).mean(), reduce_op="mean")
        return float(mean)


def _set(pairs: Sequence[tuple[Lookahead, Tensor]], values: Sequence[Tensor]) -> None:
    for lookahead in dict.fromkeys(lookahead for lookahead, _ in pairs):
        lookahead.sharding.reshard()
    for (_, p), value in zip(pairs, values, strict=True):
        p.data.copy_(value)


def _loss_of(trainer: Trainer, batch: Any, batch_idx: int) -> Tensor:
    module = trainer.lightning_module
    with trainer.precision_plugin.train_step_context():
        outputs = module.training_step(batch, batch_idx)
    loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"LossAlongDirection needs a training_step that returns a loss, got {type(loss)}."
        )
    return loss.detach().float()


@contextmanager
def _silenced(module: LightningModule) -> Iterator[None]:
    """Drop what a module logs, and evaluate it."""
    was_training = module.training
    module.eval()
    for name in ("log", "log_dict"):
        object.__setattr__(module, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            object.__delattr__(module, name)
        module.train(was_training)


class TrajectorySpectrum(Callback):
    r"""Log which share of the movement of the parameters is slow.

    A few random coordinates of each parameter are added up with random signs after each optimizer
    step: a handful of random projections of the trajectory, kept in a ring buffer. The share is
    that of the energy of the displacements :math:`x_{t+1} - x_t`, projected, below a frequency.
    Noise alone, equal at all frequencies, has the share ``2 * frequency``; the more is above that,
    the more a slow direction tells of the next steps. An EMA direction of decay :math:`\gamma`
    lets frequencies below about :math:`(1 - \gamma) / 2 \pi` pass.

    Logged as ``ema_nesterov/slow_share`` every ``window`` optimizer steps, in [0, 1].

    Args:
        frequency: Cycles per optimizer step, in (0, 0.5).
        window: Optimizer steps in the ring buffer, at least ``1 / frequency``.
        num_projections: Projections, of which the energies are added, at least 1.
        num_coordinates: Coordinates of each parameter that a projection adds up, at least 1.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        frequency: float = 0.02,
        window: int = 200,
        num_projections: int = 8,
        num_coordinates: int = 256,
    ) -> None:
        if not 0 < frequency < 0.5:
            raise ValueError(f"frequency must be in (0, 0.5), got {frequency}.")
        if window < 1 / frequency:
            raise ValueError(f"window must be at least {1 / frequency:g} steps, got {window}.")
        if num_projections < 1 or num_coordinates < 1:
            raise ValueError("num_projections and num_coordinates must be at least 1.")
        self.frequency = frequency
        self.window = window
        self.num_projections = num_projections
        self.num_coordinates = num_coordinates
        self._positions = torch.zeros(window + 1, num_projections, dtype=torch.float64)
        self._num_seen = 0
        self._last_step = 0
        self._chosen: dict[int, tuple[Tensor, Tensor]] = {}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Project the iterate, and log where the buffer is full."""
        if trainer.global_step == self._last_step:
            return  # in the middle of an accumulation window
        self._last_step = trainer.global_step
        self._positions[self._num_seen % (self.window + 1)] = self._project(trainer)
        self._num_seen += 1
        if self._num_seen > self.window and (self._num_seen - 1) % self.window == 0:
            share = self._share(trainer)
            if share is not None:
                _log(trainer, {"ema_nesterov/slow_share": share})

    @torch.no_grad()
    def _project(self, trainer: Trainer) -> Tensor:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        params = local(p for group in groups for p in group["params"] if p.requires_grad)
        total = torch.zeros(self.num_projections, dtype=torch.float64)
        for idx, p in enumerate(params):
            if p.numel():
                places, signs = self._coordinates(idx, p)
                total += (p.reshape(-1)[places].double() * signs).sum(dim=1).cpu()
        return total

    def _coordinates(self, idx: int, p: Tensor) -> tuple[Tensor, Tensor]:
        if idx not in self._chosen:
            generator = torch.Generator().manual_seed(idx)  # nobody else's random numbers change
            shape = (self.num_projections, self.num_coordinates)
            places = torch.randint(p.numel(), shape, generator=generator)
            signs = torch.randint(2, shape, generator=generator).double() * 2.0 - 1.0
            self._chosen[idx] = places.to(p.device), signs.to(p.device)
        return self._chosen[idx]

    def _share(self, trainer: Trainer) -> float | None:
        ordered = self._positions.roll(-(self._num_seen % (self.window + 1)), dims=0)
        # Shards of a parameter are parts of one projection: their positions add up.
        ordered = trainer.strategy.reduce(ordered.to(trainer.strategy.root_device), reduce_op="sum")
        energy = torch.fft.rfft(ordered.diff(dim=0).cpu(), dim=0).abs().square()
        energy[1:] *= 2.0  # the frequencies and their negatives
        if self.window % 2 == 0:
            energy[-1] /= 2.0
        total = float(energy.sum())
        slow = float(energy[: math.floor(self.frequency * self.window) + 1].sum())
        return slow / total if total > 0 else None


def _ema_nesterov_of(trainer: Trainer) -> EMANesterov:
    for callback in trainer.callbacks:
        if isinstance(callback, EMANesterov):
            return callback
    raise MisconfigurationException(
        "LossAlongDirection needs the direction of an EMANesterov callback, and there is none."
    )


def _log(trainer: Trainer, scalars: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=max(0, trainer.global_step - 1))
