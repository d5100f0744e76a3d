"""What is open from the move to the lookahead point to the end of the optimizer's step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightning_ema_nesterov.core.rule import Fold, LookaheadRule
from lightning_ema_nesterov.core.sharding import Sharding

__all__ = ["AtAverage", "Window"]


class Window:
    """The moves of parameters between two iterates.

    Args:
        rule: What moves them.
        sharding: What has to be told before they move.
        step_idx: Steps taken before.
        is_dry_run: Whether the step only makes the base optimizer create its state.

    Raises:
        RuntimeError: Here and in :meth:`begin`, while a CUDA graph is captured.

    Attributes:
        is_stepping: Whether the base optimizer has begun to change parameters.
        is_paused: Whether the parameters hold the iterate for someone who looks.
        folds: What the base optimizer is stepping.
    """

    def __init__(
        self, rule: LookaheadRule, sharding: Sharding, *, step_idx: int, is_dry_run: bool = False
    ) -> None:
        _check_not_captured()
        self.is_dry_run = is_dry_run
        self.is_stepping = False
        self.folds: list[Fold] = []
        self._rule = rule
        self._sharding = sharding
        self._step_idx = step_idx
        self._step_sizes: dict[Tensor, float] = {}  # of the parameters at the lookahead point
        self._num_changes: dict[Tensor, int] = {}  # before the base optimizer's step
        self._put_back: Callable[[], None] | None = None

    @property
    def is_paused(self) -> bool:
        """Whether the parameters hold the iterate for someone who looks."""
        return self._put_back is not None

    def extrapolate(self, params: list[Tensor], step_size: float) -> None:
        """Move parameters to the lookahead point."""
        if step_size and params:
            self._sharding.drop_copies()
            self._rule.extrapolate(params, step_size)  # params hold y
            self._step_sizes.update(dict.fromkeys(params, step_size))

    def begin(self, params: list[Tensor], *, is_measured: bool) -> None:
        """Begin the update of parameters with a gradient; all others return to the iterate."""
        _check_not_captured()
        self.is_stepping = True
        stepping = dict.fromkeys(p for p in params if p.grad is not None)
        resting = [p for p in self._step_sizes if p not in stepping]
        self._retract(resting)
        for p in resting:
            del self._step_sizes[p]
        for step_size, bucket in self._by_step_size(stepping):
            self.folds.append(self._rule.begin(bucket, step_size, is_measured=is_measured))
        self._num_changes = self._rule.store.num_changes()

    def _retract(self, params: Iterable[Tensor]) -> None:
        for step_size, bucket in self._by_step_size(params):
            if step_size:
                self._sharding.drop_copies()
                self._rule.retract(bucket, step_size)

    def to_iterate(self) -> None:
        """Return all parameters to the iterate, also in the middle of the optimizer's step.

        After an exception in it, parameters that were changed count as stepped, the others go back.
        """
        if self.is_paused:
            return
        self._sharding.drop_copies()
        in_folds = {p for fold in self.folds for p in fold.params}
        self._retract(p for p in self._step_sizes if p not in in_folds)
        now = self._rule.store.num_changes() if self.folds else {}
        for fold in self.folds:
            stepped, waiting = fold.split(lambda p: now[p] != self._num_changes[p])
            self._rule.finish(stepped, step_idx=self._step_idx)
            self._rule.cancel(waiting)
            self._retract(waiting.params)
        self._rule.make_state_readable()

    def pause(self) -> None:
        """Return all parameters to the iterate; a copy of what changes is put aside."""
        if not self.is_paused:
            self._sharding.drop_copies()
            put_back = self._put_aside()
            self.to_iterate()
            self._put_back = put_back

    def resume(self) -> None:
        """Put back, bit for bit, what :meth:`pause` put aside."""
        if self._put_back is not None:
            self._sharding.drop_copies()
            self._put_back()
            self._put_back = None

    def _put_aside(self) -> Callable[[], None]:
        store = self._rule.store
        stepped = [p for fold in self.folds for p in fold.params]
        buffers = [buffer for fold in self.folds for buffer in fold.buffers]
        new = [p for p in stepped if not store.has(p)]
        put_back_tensors = self._rule.put_aside(
            [*self._step_sizes, *stepped, *buffers, *store.tensors(stepped)]
        )

        def put_back() -> None:
            put_back_tensors()
            for p in new:
                store.drop(p)

        return put_back

    def _by_step_size(self, params: Iterable[Tensor]) -> list[tuple[float, list[Tensor]]]:
        buckets: dict[float, list[Tensor]] = defaultdict(list)
        for p in params:
            buckets[self._step_sizes.get(p, 0.0)].append(p)
        return list(buckets.items())


class AtAverage:
    r"""Parameters at the average of the iterates, or between the iterate and it.

    .. math:: x_t - s\, \frac{\gamma}{1 - \gamma}\, m_t

    Args:
        rule: A rule whose direction holds the average.
        sharding: What has to be told before parameters move.
        share: Share :math:`s` of the way from the iterate to the average, in [0, 1].

    Raises:
        TypeError: If the rule holds no average.
    """

    def __init__(self, rule: LookaheadRule, sharding: Sharding, share: float) -> None:
        if rule.average_decay is None:
            raise TypeError(f"{type(rule).__name__} holds no average of the iterates.")
        distance = share * rule.average_decay / (1.0 - rule.average_decay)
        self.share = share
        self._sharding = sharding
        params = rule.store.known_params()  # the others have not moved
        sharding.drop_copies()
        self._put_back = rule.put_aside(params)
        try:
            if distance:
                # `.data` hides the change from autograd, as in a look at the iterate.
                rule.add_directions(params, [p.data for p in params], -distance)
        except BaseException:  # as when memory runs out
            self.leave()
            raise

    def leave(self) -> None:
        """Return to the iterate, bit for bit."""
        self._sharding.drop_copies()
        self._put_back()


def _check_not_captured() -> None:
    # The graph would repeat one step size for ever, and no step that it replays would be counted.
    if _is_captured():
        raise RuntimeError(
            "A step with EMA-Nesterov must not be captured in a CUDA graph, and one is being "
            "captured: the step size is a number of the host, and so is the count of steps. "
            "Capture the forward and the backward pass (torch.cuda.make_graphed_callables, before "
            "attaching, or torch.compile with mode='reduce-overhead'), and call "
            "optimizer.step() outside of the graph."
        )


def _is_captured() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
