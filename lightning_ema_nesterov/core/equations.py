r"""The equations of EMA-Nesterov, in place, on lists of tensors.

.. math::

    y_t     &= x_t + \beta_t\, m_t                       && \text{extrapolate\_} \\
    x_{t+1} &= A_t(y_t)                                  && \text{the base optimizer's step} \\
    m_{t+1} &= \gamma\, m_t + (1 - \gamma)(x_{t+1} - x_t) && \text{begin\_, finish\_update\_}

The third equation needs :math:`x_t`, which the base optimizer has overwritten by the time
:math:`x_{t+1}` is known. No copy of it is kept: since :math:`x_t = y_t - \beta_t m_t`,

.. math::

    m_{t+1} = \underbrace{(\gamma + (1 - \gamma)\beta_t)\, m_t - (1 - \gamma)\, y_t}_{b_t}
              + (1 - \gamma)\, x_{t+1},

so while the base optimizer steps, the storage of :math:`m` holds the *fold* :math:`b_t`.
:func:`join_` is all of it in one pass over memory, for a compiler.

References:
    Yau, Li, Glentis, Boreiko, Wai, Hong, *EMA-Nesterov*, 2026. https://arxiv.org/abs/2605.25395
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.sgd import sgd

__all__ = [
    "begin_update_",
    "cancel_update_",
    "extrapolate_",
    "finish_update_",
    "fold_decay",
    "join_",
    "join_coefficients",
    "retract_",
]


@torch.no_grad()
def extrapolate_(iterates: list[Tensor], ema_directions: list[Tensor], *, step_size: float) -> None:
    r"""Move each iterate to its lookahead point, in place.

    .. math:: y_t = x_t + \beta_t\, m_t

    Args:
        iterates: Iterates :math:`x_t`, overwritten by the lookahead points :math:`y_t`.
        ema_directions: EMA directions :math:`m_t`, one for each iterate, of its shape. Read only.
        step_size: Current step size :math:`\beta_t`, in [0, 1).

    Raises:
        ValueError: If the two lists differ in length.

    Example:
        >>> x = [torch.tensor([1.0, 2.0])]
        >>> extrapolate_(x, [torch.tensor([0.5, -0.5])], step_size=0.5)
        >>> x
        [tensor([1.2500, 1.7500])]
    """
    _check_lengths(iterates, ema_directions)
    if iterates:
        torch._foreach_add_(iterates, ema_directions, alpha=step_size)  # iterates hold y


@torch.no_grad()
def retract_(lookaheads: list[Tensor], ema_directions: list[Tensor], *, step_size: float) -> None:
    r"""Undo :func:`extrapolate_`, in place.

    .. math:: x_t = y_t - \beta_t\, m_t

    The result is the former iterate up to one unit in the last place: the sum was rounded.

    Args:
        lookaheads: Lookahead points :math:`y_t`, overwritten by the iterates :math:`x_t`.
        ema_directions: The EMA directions :math:`m_t` of the extrapolation. Read only.
        step_size: The step size :math:`\beta_t` of the extrapolation.

    Raises:
        ValueError: If the two lists differ in length.

    Example:
        >>> y = [torch.tensor([1.25, 1.75])]
        >>> retract_(y, [torch.tensor([0.5, -0.5])], step_size=0.5)
        >>> y
        [tensor([1., 2.])]
    """
    extrapolate_(lookaheads, ema_directions, step_size=-step_size)  # lookaheads hold x


@torch.no_grad()
def begin_update_(
    ema_directions: list[Tensor],
    lookaheads: list[Tensor],
    *,
    ema_decay: float,
    step_size: float,
) -> None:
    r"""Fold each EMA direction with the point the base optimizer starts from, in place.

    .. math:: b_t = (\gamma + (1 - \gamma)\beta_t)\, m_t - (1 - \gamma)\, y_t

    Args:
        ema_directions: EMA directions :math:`m_t`, overwritten by the folds :math:`b_t`. At least
            float32: in bfloat16 the sum loses the direction (35 % error measured).
        lookaheads: Lookahead points :math:`y_t`, right before the base optimizer's step. Read only.
        ema_decay: Weight :math:`\gamma` of the past, in [0, 1).
        step_size: The step size :math:`\beta_t` with which the lookahead points were made.

    Raises:
        ValueError: If the two lists differ in length.

    Example:
        >>> m = [torch.tensor([1.0])]
        >>> begin_update_(m, [torch.tensor([4.0])], ema_decay=0.5, step_size=0.5)
        >>> m  # (0.5 + 0.5 * 0.5) * 1 - 0.5 * 4
        [tensor([-1.2500])]
    """
    _check_lengths(ema_directions, lookaheads)
    if all(map(_can_be_fused, ema_directions, lookaheads)):
        _begin_in_one_pass(ema_directions, lookaheads, ema_decay, step_size)
    else:
        torch._foreach_mul_(ema_directions, fold_decay(ema_decay, step_size))
        torch._foreach_add_(ema_directions, lookaheads, alpha=ema_decay - 1.0)  # they hold b


def _can_be_fused(m: Tensor, y: Tensor) -> bool:
    # The kernel takes real numbers and goes through both memories as they lie.
    return m.is_floating_point() and m.dtype == y.dtype and m.stride() == y.stride()


def _begin_in_one_pass(
    ema_directions: list[Tensor], lookaheads: list[Tensor], ema_decay: float, step_size: float
) -> None:
    # gamma + (1 - gamma) beta = 1 - (1 - gamma)(1 - beta), so
    #   b = m - (1 - gamma) (y + (1 - beta) m),
    # a step of SGD from m with the gradient y, the learning rate 1 - gamma and the weight decay
    # 1 - beta. Its fused kernel reads and writes m once.
    sgd(
        ema_directions,
        lookaheads,
        [None] * len(lookaheads),
        fused=True,
        lr=1.0 - ema_decay,
        weight_decay=1.0 - step_size,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )  # they hold b


@torch.no_grad()
def finish_update_(folds: list[Tensor], iterates: list[Tensor], *, ema_decay: float) -> None:
    r"""Turn each fold into the next EMA direction, in place.

    .. math:: m_{t+1} = b_t + (1 - \gamma)\, x_{t+1} = \gamma\, m_t + (1 - \gamma)(x_{t+1} - x_t)

    Args:
        folds: Folds :math:`b_t` of :func:`begin_update_`, overwritten by :math:`m_{t+1}`.
            Unit: parameter change per optimizer step.
        iterates: Iterates :math:`x_{t+1}`, right after the base optimizer's step. Read only.
        ema_decay: Weight :math:`\gamma` of the past, in [0, 1). The average remembers about
            ``1 / (1 - ema_decay)`` optimizer steps; 0 keeps only the last displacement.

    Raises:
        ValueError: If the two lists differ in length.

    Example:
        >>> b = [torch.tensor([-1.25])]  # x was 4 - 0.5 * 1 = 3.5
        >>> finish_update_(b, [torch.tensor([4.5])], ema_decay=0.5)
        >>> b  # 0.5 * 1 + 0.5 * (4.5 - 3.5)
        [tensor([1.])]
    """
    _check_lengths(folds, iterates)
    if folds:
        torch._foreach_add_(folds, iterates, alpha=1.0 - ema_decay)  # folds hold the next m


@torch.no_grad()
def cancel_update_(
    folds: list[Tensor],
    lookaheads: list[Tensor],
    *,
    ema_decay: float,
    step_size: float,
) -> None:
    r"""Undo :func:`begin_update_` where the base optimizer did not step, in place.

    .. math:: m_t = (b_t + (1 - \gamma)\, y_t) / (\gamma + (1 - \gamma)\beta_t)

    Args:
        folds: Folds :math:`b_t`, overwritten by the EMA directions :math:`m_t`, up to rounding.
            With ``ema_decay`` and ``step_size`` both 0 the fold does not contain the direction and
            nothing depends on it: zeros are written.
        lookaheads: Lookahead points :math:`y_t`. Read only.
        ema_decay: As given to :func:`begin_update_`.
        step_size: As given to :func:`begin_update_`.

    Raises:
        ValueError: If the two lists differ in length.

    Example:
        >>> b = [torch.tensor([-1.25])]
        >>> cancel_update_(b, [torch.tensor([4.0])], ema_decay=0.5, step_size=0.5)
        >>> b
        [tensor([1.])]
    """
    _check_lengths(folds, lookaheads)
    if not folds:
        return
    decay = fold_decay(ema_decay, step_size)
    torch._foreach_add_(folds, lookaheads, alpha=1.0 - ema_decay)
    torch._foreach_mul_(folds, 1.0 / decay if decay else 0.0)  # folds hold m again


def join_(fold: Tensor, iterate: Tensor, coefficients: Tensor) -> None:
    r"""Finish an update, extrapolate, and begin the next update, in place.

    .. math::

        m_t = b_{t-1} + (1 - \gamma)\, x_t \qquad y_t = x_t + \beta_t\, m_t \qquad
        b_t = (\gamma + (1 - \gamma)\beta_t)\, m_t - (1 - \gamma)\, y_t

    Args:
        fold: Fold :math:`b_{t-1}`, overwritten by :math:`b_t`.
        iterate: Iterate :math:`x_t`, of the same shape and dtype, overwritten by :math:`y_t`.
        coefficients: What :func:`join_coefficients` returns: a tensor, so that a compiled form
            serves every step size.

    Example:
        >>> b, x = torch.tensor([-1.25]), torch.tensor([4.5])  # m = -1.25 + 0.5 * 4.5 = 1
        >>> join_(b, x, join_coefficients(b, ema_decay=0.5, step_size=0.5, is_fold=True))
        >>> x, b  # 4.5 + 0.5 * 1, and 0.75 * 1 - 0.5 * 5
        (tensor([5.]), tensor([-1.7500]))
    """
    m = fold + coefficients[0] * iterate
    y = iterate + coefficients[1] * m
    iterate.copy_(y)
    fold.copy_(coefficients[2] * m - coefficients[3] * y)


def join_coefficients(like: Tensor, *, ema_decay: float, step_size: float, is_fold: bool) -> Tensor:
    r"""Return the coefficients of :func:`join_` as a tensor.

    Args:
        like: Has their dtype and device.
        ema_decay: Weight :math:`\gamma` of the past, in [0, 1).
        step_size: Current step size :math:`\beta_t`.
        is_fold: Whether the former update is still to be finished. Otherwise the first argument of
            :func:`join_` holds the direction :math:`m_t` already.
    """
    last = 1.0 - ema_decay
    values = [last if is_fold else 0.0, step_size, fold_decay(ema_decay, step_size), last]
    # Numbers go to a GPU with the kernels that write them; a copy from the host would wait for it.
    numbers = [torch.full((), value, dtype=like.dtype, device=like.device) for value in values]
    return torch.stack(numbers)


def fold_decay(ema_decay: float, step_size: float) -> float:
    r"""Return the weight :math:`\gamma + (1 - \gamma)\beta_t` of the direction in the fold."""
    return ema_decay + (1.0 - ema_decay) * step_size


def _check_lengths(first: list[Tensor], second: list[Tensor]) -> None:
    if len(first) != len(second):
        raise ValueError(
            f"Both lists must hold one tensor per parameter, got {len(first)} and {len(second)}."
        )
