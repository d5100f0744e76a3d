"""Adam's arithmetic on lists of tensors, for the parameters that no lean rule covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ema_nesterov.optimizers.shards import local, local_gradient

__all__ = ["adam_", "count_steps_", "step_sizes", "unscaled_directions_"]

State = Mapping[Tensor, dict[str, Any]]


def adam_(
    params: Sequence[Tensor],
    state: State,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    r"""Move parameters by Adam's rule, in place, without weight decay.

    .. math:: w \leftarrow w - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
              \frac{m}{\sqrt{v} + \epsilon}

    Epsilon is added to the root that is not corrected for the start, as the authors of all of
    these optimizers do; ``torch.optim.AdamW`` adds it to the corrected one.

    Args:
        params: Parameters with a gradient, sharded or not.
        state: The optimizer's state, where ``step``, ``exp_avg`` and ``exp_avg_sq`` are kept.
        lr: Learning rate :math:`\eta`, at least 0.
        betas: Decays :math:`\beta_1, \beta_2`, in [0, 1).
        eps: Summand :math:`\epsilon`, at least 0.
    """
    for p in params:
        if "exp_avg" not in state[p]:
            state[p]["exp_avg"] = torch.zeros_like(p)
            state[p]["exp_avg_sq"] = torch.zeros_like(p)
    moments = [[local(state[p][key]) for p in params] for key in ("exp_avg", "exp_avg_sq")]
    grads = [local_gradient(p) for p in params]
    directions = unscaled_directions_(grads, moments[0], moments[1], betas=betas, eps=eps)
    sizes = step_sizes(count_steps_(params, state), lr=lr, betas=betas)
    torch._foreach_mul_(directions, [-size for size in sizes])
    torch._foreach_add_([local(p) for p in params], directions)


def unscaled_directions_(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
) -> list[Tensor]:
    r"""Fold gradients into both moments, in place, and return :math:`m / (\sqrt{v} + \epsilon)`."""
    torch._foreach_lerp_(exp_avgs, grads, 1.0 - betas[0])
    torch._foreach_mul_(exp_avg_sqs, betas[1])
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1.0 - betas[1])
    roots = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(roots, eps)
    return list(torch._foreach_div(exp_avgs, roots))


def count_steps_(params: Sequence[Tensor], state: State) -> list[int]:
    """Count one more step of each parameter, and return the counts: they differ if one had none."""
    for p in params:
        # On the CPU and under this name, as in torch: it is read without waiting for a device, and
        # loading does not cast it to the dtype of the parameter.
        state[p].setdefault("step", torch.zeros(()))
    steps = [state[p]["step"] for p in params]
    torch._foreach_add_(steps, 1.0)
    return [int(step) for step in steps]


def step_sizes(steps: Sequence[int], *, lr: float, betas: tuple[float, float]) -> list[float]:
    """Return the learning rate with both corrections for the start, at each count of steps."""
    return [lr * (1.0 - betas[1] ** t) ** 0.5 / (1.0 - betas[0] ** t) for t in steps]
