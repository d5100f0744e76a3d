"""Steps of the sign of a momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import override

__all__ = ["SignMomentum"]


class SignMomentum(Optimizer):
    r"""Move each parameter by the learning rate, against the sign of an average of its gradients.

    .. math::

        v_{t+1} &= \mu\, v_t + (1 - \mu)\, g_t \\
        x_{t+1} &= x_t - \eta\, \mathrm{sign}(v_{t+1})

    Every operation is elementwise, so parameters may be sharded in any way.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate :math:`\eta`, above 0.
        momentum: Weight :math:`\mu` of the past, in [0, 1).

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = SignMomentum([weight], lr=0.5)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.5000, -2.5000])

    References:
        Bernstein et al., *signSGD*, 2018. https://arxiv.org/abs/1802.04434
    """

    def __init__(self, params: ParamsT, lr: float = 1e-3, momentum: float = 0.9) -> None:
        if not lr > 0:
            raise ValueError(f"lr must be above 0, got {lr}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}.")
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Call the closure, if there is one, and move the parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                average = state["momentum"].lerp_(p.grad, 1.0 - group["momentum"])
                p.add_(average.sign(), alpha=-group["lr"])
        return loss
