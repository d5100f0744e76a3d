"""What the parameters of one base optimizer hold."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor

__all__ = ["Pause", "Stage"]


class Stage(Enum):
    """What the parameters hold."""

    ITERATE = "the iterate x"
    LOOKAHEAD = "the lookahead point y"
    STEPPING = "what the base optimizer writes; the direction's storage holds the fold"
    PAUSED = "the iterate x, while what the stage before held is kept aside"


@dataclass(frozen=True)
class Pause:
    """What ``Lookahead.resume`` puts back.

    Attributes:
        stage: The stage before.
        kept: Pairs of a tensor and its copy.
        begun: The method's ``begun``.
    """

    stage: Stage
    kept: list[tuple[Tensor, Tensor]]
    begun: dict[Tensor, float]
