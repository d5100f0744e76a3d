"""Which share of the movement of the parameters is slow."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_ema_nesterov.core.sharding import local
from lightning_ema_nesterov.trainer.log import log_to_all

__all__ = ["TrajectorySpectrum"]


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
                log_to_all(trainer, {"ema_nesterov/slow_share": share})

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
