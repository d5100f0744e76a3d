"""What a lookahead method keeps for each parameter, and how a step of the optimizer updates it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ema_nesterov.core.equations import extrapolate_
from lightning_ema_nesterov.core.metrics import StepMetrics
from lightning_ema_nesterov.core.narrow import (
    extrapolate_reversibly_,
    is_narrow,
    retract_exactly_,
)
from lightning_ema_nesterov.core.sharding import Sharding, local
from lightning_ema_nesterov.core.state_store import StateStore, wide_dtype

__all__ = ["Fold", "LookaheadRule", "largest_step_size"]


@dataclass(frozen=True)
class Fold:
    """Parameters that the base optimizer is stepping together, with one step size.

    Attributes:
        params: The parameters.
        step_size: Their current step size.
        buffers: What the rule needs after the step, one tensor for each parameter. A state whose
            storage is used for it is among them.
        kept: A second tensor for each parameter where the rule needs one, else ``None``.
    """

    params: list[Tensor]
    step_size: float
    buffers: list[Tensor]
    kept: list[Tensor | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.kept:
            self.kept.extend([None] * len(self.params))

    def split(self, is_stepped: Callable[[Tensor], bool]) -> tuple[Fold, Fold]:
        """Return the parameters that the base optimizer has changed, and those that it has not."""
        rows = list(zip(self.params, self.buffers, self.kept, strict=True))
        stepped = self._of([row for row in rows if is_stepped(row[0])])
        return stepped, self._of([row for row in rows if not is_stepped(row[0])])

    def _of(self, rows: list[tuple[Tensor, Tensor, Tensor | None]]) -> Fold:
        return Fold(
            [p for p, _, _ in rows],
            self.step_size,
            [buffer for _, buffer, _ in rows],
            [kept for _, _, kept in rows],
        )


class LookaheadRule(ABC):
    r"""A lookahead method around one base optimizer, with its tensors in the optimizer's state.

    A rule writes five methods: :meth:`make_state`, :meth:`begin`, :meth:`finish`, and where they
    are needed :meth:`cancel` and :meth:`measure`. What parameters hold, and when, is not its
    concern: that is :class:`~lightning_ema_nesterov.core.lookahead.Lookahead`'s.

    Args:
        base_optimizer: The optimizer whose state holds the tensors.

    Attributes:
        keys: Names of the tensors in the state of a parameter. The first is the direction along
            which parameters are extrapolated, for rules that have one.
        loadable_keys: Names that :meth:`restore` reads in a checkpoint; by default ``keys``.
        step_size_key: Key of a parameter group that holds a peak step size of its own; ``None`` for
            rules whose step size is no choice.
        store: Where the tensors are.

    Raises:
        TypeError: If ``base_optimizer`` is not a ``torch.optim.Optimizer``.
    """

    keys: tuple[str, ...]
    loadable_keys: tuple[str, ...] = ()
    step_size_key: str | None = None

    def __init__(self, base_optimizer: Optimizer) -> None:
        self.store = StateStore(base_optimizer, self.keys, self.loadable_keys)
        # Of parameters with few digits: which elements the last extrapolation did not move.
        self._stays: dict[Tensor, list[Tensor]] = {}

    @property
    def base_optimizer(self) -> Optimizer:
        """The optimizer whose state holds the tensors."""
        return self.store.base_optimizer

    @property
    def average_decay(self) -> float | None:
        r"""Decay :math:`\gamma` of the average of the iterates that the direction holds.

        .. math:: a_t = x_t - \frac{\gamma}{1 - \gamma}\, m_t

        ``None`` for a rule whose direction holds none.
        """
        return None

    @abstractmethod
    def make_state(self, p: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a parameter that has not moved yet."""

    @abstractmethod
    def begin(self, params: list[Tensor], step_size: float, *, is_measured: bool) -> Fold:
        """Start the update, right before the base optimizer's step.

        Args:
            params: Parameters that will be stepped, at their lookahead points.
            step_size: The step size with which these were made.
            is_measured: Whether :meth:`measure` will be called after the step.
        """

    @abstractmethod
    def finish(self, fold: Fold, *, step_idx: int) -> None:
        """End the update of parameters that the base optimizer has stepped.

        Args:
            fold: What :meth:`begin` returned, or a part of it.
            step_idx: Steps taken before this one.
        """

    def cancel(self, fold: Fold) -> None:
        """Undo :meth:`begin` for parameters that the base optimizer did not change.

        They are still at their lookahead points.

        Args:
            fold: What :meth:`begin` returned, or a part of it.
        """
        return

    def measure(self, folds: list[Fold], sharding: Sharding) -> StepMetrics | None:
        """Measure a finished step, where the rule can."""
        return None

    def after_step(self, step_idx: int) -> None:
        """Do what follows a whole step, also one that GradScaler skipped.

        Args:
            step_idx: Steps taken before this one.
        """
        return

    def extrapolate(self, params: list[Tensor], step_size: float) -> None:
        """Move parameters to their lookahead points, in place.

        Args:
            params: Parameters at their iterates, which have their tensors.
            step_size: Their step size, not 0.
        """
        wide = [p for p in params if not is_narrow(p)]
        self.add_directions(wide, wide, step_size)
        for p in params:
            if is_narrow(p):
                pieces = self.pieces(p, p.detach())
                self._stays[p] = [
                    extrapolate_reversibly_(x, m, step_size=step_size) for x, m in pieces
                ]

    def retract(self, params: list[Tensor], step_size: float) -> None:
        """Undo :meth:`extrapolate`, where no step follows."""
        # `.data` hides the change from autograd: after a look the tensors it saved are as before.
        wide = [p for p in params if not is_narrow(p)]
        self.add_directions(wide, [p.data for p in wide], -step_size)
        for p in params:
            if is_narrow(p):
                self._retract_narrow(p, p.data, step_size)

    def iterate_of(self, p: Tensor, step_size: float) -> Tensor:
        """Return a copy of a parameter at its iterate, while it is at its lookahead point.

        Args:
            p: The parameter.
            step_size: The step size with which it was moved; 0 where it was not.
        """
        iterate = p.detach().clone()
        if step_size and is_narrow(p):
            self._retract_narrow(p, iterate, step_size)
        elif step_size:
            self.add_directions([p], [iterate], -step_size)
        return iterate

    @torch.no_grad()
    def add_directions(
        self, params: Sequence[Tensor], points: Sequence[Tensor], factor: float
    ) -> None:
        """Add a multiple of the directions of parameters to points, in place."""
        extrapolate_(local(points), local(self.store.column(params)), step_size=factor)

    def pieces(self, p: Tensor, point: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a point and the direction of a parameter, as this process holds them, in parts."""
        yield local([point])[0], self.read_direction(p)

    def _retract_narrow(self, p: Tensor, point: Tensor, step_size: float) -> None:
        pieces = list(self.pieces(p, point))
        stays = self._stays.get(p, [None] * len(pieces))
        for (y, m), stay in zip(pieces, stays, strict=True):
            retract_exactly_(y, m, stay, step_size=step_size)

    def read_direction(self, p: Tensor) -> Tensor:
        """Return the part of a parameter's direction that this process holds."""
        return local(self.store.column([p]))[0]

    @torch.no_grad()
    def transform(self, p: Tensor, linear_map: Callable[[Tensor], Tensor]) -> None:
        """Apply a linear map to what is kept of a parameter to which it is applied as well.

        Args:
            p: A parameter whose state is readable.
            linear_map: Takes and returns a tensor of its shape in float64.
        """
        for tensor in self.store.tensors([p]):
            tensor.copy_(linear_map(tensor.double()))

    def make_state_readable(self) -> None:
        """Have the state hold what its keys say, where an update that is under way changed it."""
        return

    def put_aside(self, tensors: Iterable[Tensor]) -> Callable[[], None]:
        """Copy tensors, and what the rule knows of an update; return what puts both back."""
        kept = [(tensor, tensor.detach().clone()) for tensor in dict.fromkeys(tensors)]

        def put_back() -> None:
            for tensor, copy in kept:
                # `.data` hides the change from autograd: the tensors it saved are as before.
                tensor.data.copy_(copy)

        return put_back

    def restore(self, p: Tensor, loaded: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a parameter from those of a checkpoint."""
        return {key: tensor.to(p.device, wide_dtype(p)) for key, tensor in loaded.items()}

    def check_checkpoint(self, has: Callable[[str], bool]) -> None:
        """Raise where a distributed checkpoint stores tensors in another format.

        Args:
            has: Whether the checkpoint has an entry for a key.

        Raises:
            ValueError: With the remedy.
        """
        return


def largest_step_size(folds: Sequence[Fold]) -> float:
    """Return the step size that is furthest from 0."""
    return max((fold.step_size for fold in folds), key=abs, default=0.0)
