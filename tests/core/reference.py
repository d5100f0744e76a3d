"""The paper's loop, slow and plain, in float64: the only oracle of the tests.

It keeps the previous iterate and both buffers, and shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Gradients = Callable[[list[Tensor], int], Sequence[Tensor | None]]
"""Maps parameters y and the step t to their gradients; None leaves a parameter untouched."""


def train(
    x_0: Sequence[Tensor],
    gradients: Gradients,
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    *,
    num_steps: int,
    ema_decay: float,
    step_size: Callable[[int], float | Sequence[float]],
    dtype: torch.dtype = torch.float64,
    make_scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
    | None = None,
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Return the iterates x_0 ... x_n and the last EMA direction.

    The step size is one for all parameters, or one for each.
    """
    params = [x.detach().clone().to(dtype).requires_grad_() for x in x_0]
    optimizer = make_optimizer(params)
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    m = [torch.zeros_like(p) for p in params]
    trajectory = [[p.detach().clone() for p in params]]
    for t in range(num_steps):
        x = trajectory[-1]
        beta = step_size(t)
        betas = [beta] * len(x) if isinstance(beta, (int, float)) else beta
        y = [x_i + beta_i * m_i for x_i, m_i, beta_i in zip(x, m, betas, strict=True)]
        with torch.no_grad():
            for p, y_i in zip(params, y, strict=True):
                p.copy_(y_i)
        grads = gradients(params, t)
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.detach().to(dtype)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        x_next = []
        for idx, p in enumerate(params):
            if grads[idx] is None:
                with torch.no_grad():
                    p.copy_(x[idx])
            else:
                m[idx] = ema_decay * m[idx] + (1 - ema_decay) * (p.detach() - x[idx])
            x_next.append(p.detach().clone())
        trajectory.append(x_next)
    return trajectory, m
