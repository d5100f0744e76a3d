"""EMA-Nesterov on factors that are written anew every so often, slow and plain, in float64.

Shares no code with the package: the singular value decomposition is that of the dense product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Gradients = Callable[[list[Tensor], int], Sequence[Tensor]]
Pair = tuple[int, int]


def refactorized(
    left: Tensor, right: Tensor, m_left: Tensor, m_right: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Balance two factors and carry their directions along."""
    rank = left.shape[1]
    u, s, vh = torch.linalg.svd(left @ right, full_matrices=False)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    new_left, new_right = u * s.sqrt(), s.sqrt()[:, None] * vh
    gauge = torch.linalg.lstsq(left, new_left).solution
    return new_left, new_right, m_left @ gauge, torch.linalg.solve(gauge, m_right)


def train(
    x_0: Sequence[Tensor],
    gradients: Gradients,
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    *,
    pairs: Sequence[Pair],
    num_steps: int,
    ema_decay: float,
    step_size: float,
    refactorize_every: int | None,
    reset_every: int | None,
    recovery_steps: int = 0,
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Return the iterates x_0 ... x_n, and the lookahead points y_0 ... y_(n-1).

    ``pairs`` are the places of the two factors of each product.
    """
    x = [p.detach().clone().double() for p in x_0]
    m = [torch.zeros_like(p) for p in x]
    params = [p.clone().requires_grad_() for p in x]
    optimizer = make_optimizer(params)
    iterates, lookaheads = [x], []
    for t in range(num_steps):
        factor = 1.0
        if reset_every and t >= reset_every:
            since = t % reset_every
            optimizer = optimizer if since else make_optimizer(params)  # a new one knows of nothing
            if since < recovery_steps:
                factor = 1e-3 + (1 - 1e-3) * since / max(1, recovery_steps - 1)
        y = [p + factor * step_size * direction for p, direction in zip(x, m, strict=True)]
        lookaheads.append(y)
        put(params, y)
        step(optimizer, params, gradients(params, t), factor)
        moved = [p.detach() - before for p, before in zip(params, x, strict=True)]
        m = [ema_decay * d + (1 - ema_decay) * u for d, u in zip(m, moved, strict=True)]
        x = [p.detach().clone() for p in params]
        if refactorize_every and (t + 1) % refactorize_every == 0:
            for b, a in pairs:
                x[b], x[a], m[b], m[a] = refactorized(x[b], x[a], m[b], m[a])
            put(params, x)
        iterates.append(x)
    return iterates, lookaheads


@torch.no_grad()
def put(params: Sequence[Tensor], points: Sequence[Tensor]) -> None:
    for p, point in zip(params, points, strict=True):
        p.copy_(point)


def step(
    optimizer: torch.optim.Optimizer,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    factor: float,
) -> None:
    """Take one step, with the learning rate times a factor."""
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    [group] = optimizer.param_groups
    lr = group["lr"]
    group["lr"] = lr * factor
    optimizer.step()
    group["lr"] = lr
