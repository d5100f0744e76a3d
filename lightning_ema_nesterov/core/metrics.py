r"""What is logged, one function per quantity. Tags and units are in :class:`StepMetrics`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "StepMetrics",
    "alignment",
    "displacement",
    "row_of_step",
    "sums_of_step",
    "tag_suffixes",
]


@dataclass(frozen=True)
class StepMetrics:
    r"""One optimizer step, measured over all parameters of one base optimizer that took it.

    Attributes:
        step_size: Current step size :math:`\beta_t`, the largest over the parameter groups.
        direction_norm: Euclidean norm of :math:`m_{t+1}`. Unit: parameter change per step.
        displacement_norm: Euclidean norm of :math:`x_{t+1} - x_t`. Unit: as ``direction_norm``.
        alignment: Cosine of :math:`m_t` and :math:`x_{t+1} - x_t`, in [-1, 1]; 0 while
            :math:`m_t = 0`.
    """

    step_size: float
    direction_norm: float
    displacement_norm: float
    alignment: float

    @classmethod
    def from_sums(cls, sums: Tensor, step_size: float) -> StepMetrics:
        """Make the metrics from the four sums of :func:`sums_of_step` over all parameters.

        Example:
            >>> StepMetrics.from_sums(torch.tensor([4.0, 25.0, 9.0, 3.0]), step_size=0.5)
            StepMetrics(step_size=0.5, direction_norm=5.0, displacement_norm=3.0, alignment=0.5)
        """
        before, after, moved, dot = sums.tolist()  # the only synchronisation with a GPU
        return cls(
            step_size=step_size,
            direction_norm=math.sqrt(after),
            displacement_norm=math.sqrt(moved),
            alignment=alignment(dot, math.sqrt(before), math.sqrt(moved)),
        )

    def as_scalars(self, suffix: str = "") -> dict[str, float]:
        """Return the TensorBoard tags and values.

        Args:
            suffix: Appended to each tag, to tell several optimizers apart.
        """
        return {f"ema_nesterov/{name}{suffix}": value for name, value in vars(self).items()}


def tag_suffixes(names: Sequence[str]) -> list[str]:
    """Return what tells the tags of several optimizers apart; nothing for a single one.

    Example:
        >>> tag_suffixes(["AdamW"]), tag_suffixes(["AdamW", "SGD", "AdamW"])
        ([''], ['/AdamW-0', '/SGD', '/AdamW-1'])
    """
    if len(names) == 1:
        return [""]
    return [
        f"/{name}" if names.count(name) == 1 else f"/{name}-{names[:idx].count(name)}"
        for idx, name in enumerate(names)
    ]


def displacement(previous_direction: Tensor, direction: Tensor, *, ema_decay: float) -> Tensor:
    r"""Return the displacement between two EMA directions.

    .. math:: x_{t+1} - x_t = (m_{t+1} - \gamma\, m_t) / (1 - \gamma)

    Args:
        previous_direction: EMA direction :math:`m_t`, any shape.
        direction: EMA direction :math:`m_{t+1}`, of the same shape.
        ema_decay: Weight :math:`\gamma` of the past, in [0, 1).

    Example:
        >>> displacement(torch.tensor([1.0]), torch.tensor([1.5]), ema_decay=0.5)
        tensor([2.])
    """
    return direction.sub(previous_direction, alpha=ema_decay).div_(1.0 - ema_decay)


def alignment(dot: float, first_norm: float, second_norm: float) -> float:
    """Return the cosine of two vectors; 0 where one of them is 0.

    Args:
        dot: Inner product of the two vectors.
        first_norm: Euclidean norm of the first.
        second_norm: Euclidean norm of the second.

    Example:
        >>> alignment(6.0, 3.0, 4.0)
        0.5
    """
    product = first_norm * second_norm
    return dot / product if product > 0 else 0.0


@torch.no_grad()
def sums_of_step(
    previous_directions: Sequence[Tensor | None],
    directions: Sequence[Tensor],
    *,
    ema_decay: float,
) -> Tensor:
    r"""Return what has to be added over parameters to measure a step.

    One tensor of the size of the largest parameter is held for the time of the call.

    Args:
        previous_directions: EMA directions :math:`m_t`; ``None`` where it is 0.
        directions: EMA directions :math:`m_{t+1}`, in the same order.
        ema_decay: Weight :math:`\gamma` of the past, in [0, 1).

    Returns:
        For each parameter the squared norms of :math:`m_t`, :math:`m_{t+1}` and
        :math:`x_{t+1} - x_t`, and the inner product of the first and the last; shape
        ``(num_parameters, 4)``.

    Example:
        >>> sums_of_step([None], [torch.tensor([3.0, 4.0])], ema_decay=0.5)
        tensor([[  0.,  25., 100.,   0.]])
    """
    rows: list[Tensor] = []
    for previous, direction in zip(previous_directions, directions, strict=True):
        m_0 = torch.zeros_like(direction) if previous is None else previous
        moved = displacement(m_0, direction, ema_decay=ema_decay)
        rows.append(row_of_step(m_0, direction, moved))
    return torch.stack(rows) if rows else torch.zeros(0, 4)


def row_of_step(before: Tensor, after: Tensor, moved: Tensor) -> Tensor:
    r"""Return what :func:`sums_of_step` does for one parameter.

    Args:
        before: EMA direction :math:`m_t`, any shape.
        after: EMA direction :math:`m_{t+1}`.
        moved: Displacement :math:`x_{t+1} - x_t`.

    Example:
        >>> row_of_step(torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([4.0]))
        tensor([ 4.,  9., 16.,  8.])
    """
    vectors = [_as_real_vector(tensor) for tensor in (before, after, moved)]
    squares = [torch.linalg.vector_norm(vector).float().square() for vector in vectors]
    return torch.stack([*squares, torch.dot(vectors[0], vectors[2]).float()])


def _as_real_vector(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
