"""Step sizes that choose themselves, for self_chosen.yaml. They are not part of the package."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY


class SelfChosenStepSize(EMANesterov):
    r"""EMA-Nesterov whose peak step size follows what the base optimizer does.

    :math:`d_t` is the base displacement :math:`x_{t+1} - y_t`. For plain SGD
    :math:`\langle d_t, m_t\rangle` is the learning rate times how fast the loss falls with
    :math:`\beta` at :math:`y_t`. Averages are over the memory of m.

    Args:
        chooses_by: ``"steadiness"``: :math:`\beta = \langle d, m\rangle / \langle m, m\rangle`,
            both averaged. A drift without noise has :math:`d = (1-\beta)\,m`, so that this settles
            at 0.5; noise alone gives 0.
            ``"alignment"``: :math:`\beta` grows by ``speed`` times the cosine of d and m in each
            step.
            ``"bounded"``: ``lookahead_step_size``, but :math:`\beta\,\lVert m\rVert` is at most
            ``share`` of the average of :math:`\lVert d\rVert`: a jump stays small beside a step.
            ``"polyak"``: :math:`\beta = (f - f^*) / -\langle g, m\rangle`, both averaged, of the
            training loss f and the gradient g at :math:`y_t`; 0 where the loss does not fall along
            m.
        lookahead_step_size: Where it begins.
        largest: Upper bound of the step size, in (0, 1); the lower bound is 0.
        speed: For ``"alignment"``.
        share: For ``"bounded"``, above 0.
        target: For ``"polyak"``, :math:`f^*`: a loss below what the run will reach.
    """

    def __init__(
        self,
        chooses_by: Literal["steadiness", "alignment", "bounded", "polyak"],
        lookahead_step_size: float = 0.5,
        largest: float = 0.7,
        speed: float = 0.05,
        share: float = 0.1,
        target: float = 0.0,
        **arguments: Any,
    ) -> None:
        super().__init__(lookahead_step_size, scale_with_lr=False, **arguments)
        self._chooses_by = chooses_by
        self._begin = lookahead_step_size
        self._largest = largest
        self._speed = speed
        self._share = share
        self._target = target
        self._peak = lookahead_step_size
        self._before: Tensor | None = None
        self._slope = 0.0
        self._averages: dict[str, float] = {}

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._before is not None and self._chooses_by == "polyak":
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in _params(optimizer)]
            self._slope = torch.dot(torch.cat([g.flatten() for g in grads]), self._before).item()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        [optimizer] = trainer.optimizers
        [lookahead] = self.lookaheads
        after = torch.cat([optimizer.state[p][DIRECTION_KEY].flatten() for p in _params(optimizer)])
        if self._before is not None:
            taken = lookahead.schedule.step_size(trainer.global_step - 1, peak=self._peak)
            decay = self.settings.ema_decay
            moved = (after - decay * self._before) / (1.0 - decay) - taken * self._before
            chosen = self._choose(self._before, moved, float(outputs["loss"]))
            self._peak = min(max(chosen, 0.0), self._largest)
            for group in optimizer.param_groups:
                group["lookahead_step_size"] = self._peak
        self._before = after
        self.log("self_chosen_step_size", self._peak)

    def _choose(self, direction: Tensor, moved: Tensor, loss: float) -> float:
        dot = torch.dot(moved, direction).item()
        length, of_step = direction.norm().item(), moved.norm().item()
        if self._chooses_by == "steadiness":
            square = self._average("square", length**2)
            return self._average("dot", dot) / max(square, 1e-30)
        if self._chooses_by == "alignment":
            return self._peak + self._speed * dot / max(length * of_step, 1e-30)
        if self._chooses_by == "bounded":
            bound = self._share * self._average("step", of_step) / max(length, 1e-30)
            return min(self._begin, bound)
        falls = -self._average("slope", self._slope)
        above = self._average("loss", loss) - self._target * self._average("one", 1.0)
        return above / falls if falls > 0 else 0.0

    def _average(self, name: str, value: float) -> float:
        """Return the average of a value so far, which starts at 0."""
        decay = self.settings.ema_decay
        self._averages[name] = decay * self._averages.get(name, 0.0) + (1.0 - decay) * value
        return self._averages[name]


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
