"""How far a step looks ahead, beside the size of the parameters."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_ema_nesterov.callback import EMANesterov
from lightning_ema_nesterov.core.sharding import local
from lightning_ema_nesterov.trainer.log import log_to_all

__all__ = ["RelativeDirection"]


class RelativeDirection(Callback):
    r"""Log the norm of :math:`m` over that of :math:`x`, at the end of each epoch.

    Logged as ``ema_nesterov/relative_direction``, over all parameters that have a direction. Unit:
    share of the parameters' norm per step.

    Raises:
        MisconfigurationException: When fit starts, without an EMANesterov callback.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is a direction."""
        _ema_nesterov_of(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log."""
        sums = torch.zeros(2, device=trainer.strategy.root_device)
        for lookahead in _ema_nesterov_of(trainer).lookaheads:
            for p in lookahead.rule.store.known_params():
                sums += torch.stack(
                    [_square(lookahead.rule.read_direction(p)), _square(*local([p.detach()]))]
                )
        # Shards add up; copies of a whole parameter do too, which cancels in the ratio.
        direction, point = trainer.strategy.reduce(sums, reduce_op="sum").sqrt().tolist()
        if point > 0:
            log_to_all(trainer, {"ema_nesterov/relative_direction": direction / point})


def _square(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm.float().square()


def _ema_nesterov_of(trainer: Trainer) -> EMANesterov:
    callbacks: list[Any] = [*trainer.callbacks]  # type: ignore[attr-defined]  # set outside of the class
    for callback in callbacks:
        if isinstance(callback, EMANesterov):
            return callback
    raise MisconfigurationException("RelativeDirection needs an EMANesterov callback beside it.")
