r"""Moves of parameters that have fewer digits than their directions, as in bfloat16.

There :math:`y = x + \beta m` is rounded by as much as the move is long, so that :math:`y - \beta m`
is not :math:`x`: a direction that took it for :math:`x` would count its own move once more in each
step. Rounded to the dtype of :math:`x` it is :math:`x` for nearly all elements. The others, next to
a power of 2 or half way between two numbers, do not move; one bit of each element tells which.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["extrapolate_reversibly_", "is_narrow", "retract_exactly_"]


def is_narrow(p: Tensor) -> bool:
    """Return whether a parameter has fewer digits than float32."""
    return torch.promote_types(p.dtype, torch.float32) != p.dtype


@torch.no_grad()
def extrapolate_reversibly_(iterate: Tensor, ema_direction: Tensor, *, step_size: float) -> Tensor:
    r"""Move an iterate to its lookahead point, in place, where it can be undone.

    .. math:: y_t = \mathrm{round}(x_t + \beta_t\, m_t)
        \quad\text{where}\quad \mathrm{round}(y_t - \beta_t\, m_t) = x_t

    Args:
        iterate: Iterate :math:`x_t`, overwritten by the lookahead point :math:`y_t`.
        ema_direction: EMA direction :math:`m_t`, of its shape and at least float32. Read only.
        step_size: Current step size :math:`\beta_t`, in (-1, 1).

    Returns:
        Which elements did not move, one bit each, for :func:`retract_exactly_`.

    Example:
        >>> x, m = torch.tensor([2.0, 3.0]).bfloat16(), torch.tensor([0.01, -0.04])
        >>> stays = extrapolate_reversibly_(x, m, step_size=0.5)
        >>> x  # 2.005 is rounded to 2
        tensor([2.0000, 2.9844], dtype=torch.bfloat16)
        >>> x - (0.5 * m).bfloat16()  # below 2 numbers are nearer together
        tensor([1.9922, 3.0000], dtype=torch.bfloat16)
        >>> retract_exactly_(x, m, stays, step_size=0.5)
        >>> x
        tensor([2., 3.], dtype=torch.bfloat16)
    """
    lookahead = torch.add(iterate, ema_direction, alpha=step_size).to(iterate.dtype)
    back = torch.sub(lookahead, ema_direction, alpha=step_size).to(iterate.dtype)
    stays = back != iterate
    iterate.copy_(torch.where(stays, iterate, lookahead))  # iterate holds y
    return _pack(stays)


@torch.no_grad()
def retract_exactly_(
    lookahead: Tensor, ema_direction: Tensor, stays: Tensor | None, *, step_size: float
) -> None:
    """Undo :func:`extrapolate_reversibly_`, in place and bit for bit.

    Args:
        lookahead: Lookahead point, overwritten by the iterate.
        ema_direction: As given there, unchanged since.
        stays: What it returned; ``None`` where all elements moved.
        step_size: As given there.
    """
    iterate = torch.sub(lookahead, ema_direction, alpha=step_size).to(lookahead.dtype)
    if stays is not None:
        iterate = torch.where(_unpack(stays, lookahead), lookahead, iterate)
    lookahead.copy_(iterate)  # lookahead holds x


def _bits(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def _pack(flags: Tensor) -> Tensor:
    flat = flags.reshape(-1).to(torch.uint8)
    octets = pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (octets << _bits(flat)).sum(dim=1, dtype=torch.uint8)


def _unpack(packed: Tensor, like: Tensor) -> Tensor:
    octets = (packed.unsqueeze(1) >> _bits(packed)) & 1
    return octets.view(-1)[: like.numel()].view(like.shape).bool()
