"""Step sizes that choose themselves, for self_chosen.yaml. They are not part of the package."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY


class SelfChosenStepSize(EMANesterov):
    r"""EMA-Nesterov whose peak step size follows what the base optimizer does.

    :math:`d_t` is the base displacement :math:`x_{t+1} - y_t`. For plain SGD
    :math:`\langle d_t, m_t\rangle` is the learning rate times how fast the loss falls with
    :math:`\beta` at :math:`y_t`.

    Args:
        chooses_by: ``"steadiness"``: :math:`\beta = \langle d, m\rangle / \langle m, m\rangle`,
            both averaged over the memory of m. A drift without noise has
            :math:`d = (1-\beta)\,m`, so that this settles at 0.5; noise alone gives 0.
            ``"alignment"``: :math:`\beta` grows by ``speed`` times the cosine of d and m in each
            step.
        lookahead_step_size: Where it begins.
        largest: Upper bound of the step size, in (0, 1); the lower bound is 0.
        speed: For ``"alignment"``.
    """

    def __init__(
        self,
        chooses_by: Literal["steadiness", "alignment"],
        lookahead_step_size: float = 0.5,
        largest: float = 0.7,
        speed: float = 0.05,
        **arguments: Any,
    ) -> None:
        super().__init__(lookahead_step_size, scale_with_lr=False, **arguments)
        self._chooses_by = chooses_by
        self._largest = largest
        self._speed = speed
        self._peak = lookahead_step_size
        self._before: Tensor | None = None
        self._dot = self._square = 0.0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        [optimizer] = trainer.optimizers
        [lookahead] = self.lookaheads
        params = [p for group in optimizer.param_groups for p in group["params"]]
        after = torch.cat([optimizer.state[p][DIRECTION_KEY].flatten() for p in params])
        if self._before is not None:
            taken = lookahead.schedule.step_size(trainer.global_step - 1, peak=self._peak)
            self._choose(self._before, after, taken)
            for group in optimizer.param_groups:
                group["lookahead_step_size"] = self._peak
        self._before = after
        self.log("self_chosen_step_size", self._peak)

    def _choose(self, before: Tensor, after: Tensor, step_size: float) -> None:
        decay = self.settings.ema_decay
        moved = (after - decay * before) / (1.0 - decay) - step_size * before
        dot = torch.dot(moved, before).item()
        square = before.square().sum().item()
        if self._chooses_by == "steadiness":
            self._dot = decay * self._dot + (1.0 - decay) * dot
            self._square = decay * self._square + (1.0 - decay) * square
            peak = self._dot / max(self._square, 1e-30)
        else:
            norms = moved.norm().item() * before.norm().item()
            peak = self._peak + self._speed * dot / max(norms, 1e-30)
        self._peak = min(max(peak, 0.0), self._largest)
