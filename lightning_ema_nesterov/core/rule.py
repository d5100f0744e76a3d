"""What a lookahead method keeps for each parameter: where, and how a step updates it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_ema_nesterov.core.equations import extrapolate_, retract_
from lightning_ema_nesterov.core.metrics import StepMetrics
from lightning_ema_nesterov.core.sharding import Sharding, local

__all__ = ["Fold", "Method", "wide_dtype"]


@dataclass(frozen=True)
class Fold:
    """Parameters that the base optimizer is stepping together, with one step size.

    Attributes:
        params: The parameters.
        buffers: What the method needs after the step, one for each parameter; a direction whose
            storage is used for it is among them.
        step_size: Their current step size.
        previous: Copies of the directions from before, where they are to be measured; ``None``
            stands for zero.
        versions: Autograd's counts of in-place changes, from before the base optimizer's step.
    """

    params: list[Tensor]
    buffers: list[Tensor]
    step_size: float
    previous: list[Tensor | None] = field(default_factory=list)
    versions: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", [p._version for p in self.params])

    def part(self, *, is_changed: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parameters that the base optimizer has changed, or not, and their buffers."""
        rows = zip(self.params, self.buffers, self.versions, strict=True)
        chosen = [(p, b) for p, b, v in rows if (p._version != v) is is_changed]
        return [p for p, _ in chosen], [b for _, b in chosen]


class Method(ABC):
    r"""Tensors in ``base_optimizer.state[p]``, and their update around a step of the optimizer.

    Each tensor has the shape of its parameter and is placed like it, so that every strategy saves,
    gathers and reshards it; in float32 or the parameter's dtype where that is wider.
    It is made in the first step in which the parameter has a gradient, after the base optimizer:
    most base optimizers take a parameter with any state for one that they have initialised.

    Args:
        base_optimizer: The optimizer whose state holds the tensors.

    Attributes:
        keys: Names of the tensors in the state of a parameter. The first is the direction along
            which parameters are extrapolated, for methods that have one.
        loadable_keys: Names that :meth:`restore` reads in a checkpoint; by default ``keys``.
        begun: Parameters at their lookahead points whose update :meth:`extrapolate` has begun
            already, and their step sizes. Empty for methods that begin in :meth:`begin`.
    """

    keys: tuple[str, ...]
    loadable_keys: tuple[str, ...] = ()

    def __init__(self, base_optimizer: Optimizer) -> None:
        self.base_optimizer = base_optimizer
        self.begun: dict[Tensor, float] = {}
        self._loaded: list[dict[str, Tensor]] = []

    def has(self, p: Tensor) -> bool:
        """Return whether a parameter has its tensors."""
        # `state` is a defaultdict: indexing it would give every parameter an empty state.
        return self.keys[0] in self.base_optimizer.state.get(p, {})

    def known_params(self) -> list[Tensor]:
        """Return all parameters that have their tensors."""
        groups = self.base_optimizer.param_groups
        return [p for group in groups for p in group["params"] if self.has(p)]

    def of(self, params: Sequence[Tensor], key: str = "") -> list[Tensor]:
        """Return one tensor of each parameter; without a key the direction."""
        return [self.base_optimizer.state[p][key or self.keys[0]] for p in params]

    def read(self, p: Tensor) -> Tensor:
        """Return the part of a parameter's direction that this process holds."""
        return local(self.of([p]))[0]

    def tensors_of(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return every tensor that parameters have."""
        states = [self.base_optimizer.state.get(p, {}) for p in params]
        return [state[key] for state in states for key in self.keys if key in state]

    def extrapolate(self, params: list[Tensor], step_size: float) -> None:
        """Move parameters to their lookahead points, in place.

        Args:
            params: Parameters at their iterates, which have their tensors.
            step_size: Their step size, not 0.
        """
        extrapolate_(local(params), local(self.of(params)), step_size=step_size)

    def retract(self, params: list[Tensor], step_size: float) -> None:
        """Undo :meth:`extrapolate`, where no step follows."""
        # `.data` hides the change from autograd: after a pause the tensors it saved are whole.
        points = local(p.data for p in params)
        retract_(points, local(self.of(params)), step_size=step_size)

    def make_whole(self) -> None:
        """Have the state hold what its keys say, where :attr:`begun` or a late end changed it."""
        return

    @abstractmethod
    def begin(self, params: list[Tensor], step_size: float, *, is_measured: bool) -> Fold:
        """Start the update, right before the base optimizer's step.

        Args:
            params: Parameters that will be stepped, at their lookahead points.
            step_size: The step size with which these were made.
            is_measured: Whether to keep copies of the directions.
        """

    @abstractmethod
    def finish(self, folds: list[Fold], *, step_idx: int) -> None:
        """End the update, right after the base optimizer's step.

        Args:
            folds: What :meth:`begin` returned.
            step_idx: Steps taken before this one.
        """

    @abstractmethod
    def settle(self, fold: Fold) -> list[Tensor]:
        """End an update whose step was interrupted.

        Parameters that the base optimizer changed count as stepped. What was kept for the others
        goes back to what it was.

        Returns:
            The others; they are still at their lookahead points.
        """

    @abstractmethod
    def make_state(self, p: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a parameter that has not moved yet."""

    @torch.no_grad()
    def restart(self, params: Sequence[Tensor]) -> None:
        """Forget a step that was none; rounding can have left something of it."""
        self.make_whole()
        for p in params:
            for key, tensor in self.make_state(p).items():
                self.base_optimizer.state[p][key].copy_(tensor)

    def measure(self, folds: list[Fold], sharding: Sharding) -> StepMetrics | None:
        """Measure a finished step, where the method can."""
        return None

    def complete(self) -> None:
        """Give tensors to parameters that had no gradient, where a checkpoint needs them.

        A distributed checkpoint is read into what a step with all gradients leaves. Where the base
        optimizer has no state of its own, a parameter without a gradient needs ours.
        """
        groups = self.base_optimizer.param_groups
        params = [p for group in groups for p in group["params"] if p.requires_grad]
        missing = [p for p in params if not self.has(p)]
        states = self.base_optimizer.state.values()
        own = set(self.keys)
        if missing and all(self.keys[0] in state and own.issuperset(state) for state in states):
            for p in missing:
                self.base_optimizer.state[p].update(self.make_state(p))

    def free(self, *, keeps_shards: bool) -> None:
        """Drop the tensors of all parameters: no step will need them.

        In a distributed run a parameter keeps them, as zeros, where the base optimizer has no state
        of its own: FSDP cannot load an empty one.

        Args:
            keeps_shards: Whether shards keep them too, as zeros.
        """
        self.make_whole()
        own = set(self.keys)
        is_distributed = dist.is_available() and dist.is_initialized()
        for p, state in list(self.base_optimizer.state.items()):
            is_alone = is_distributed and own.issuperset(state)
            for key in own.intersection(state):
                if is_alone or (keeps_shards and isinstance(p, DTensor)):
                    state[key].zero_()
                else:
                    del state[key]
            if not state:
                del self.base_optimizer.state[p]

    def check_checkpoint(self, has: Callable[[str], bool]) -> None:
        """Raise where a distributed checkpoint stores tensors in another format.

        Args:
            has: Whether the checkpoint has an entry for a key.

        Raises:
            ValueError: With the remedy.
        """
        return

    def keep_dtype_on_load(self) -> list[RemovableHandle]:
        """Register hooks: ``load_state_dict`` rounds every state to its parameter's dtype."""
        return [
            self.base_optimizer.register_load_state_dict_pre_hook(self._before_load),
            self.base_optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        # Parameters are matched by position, as `load_state_dict` does: their keys can be names.
        params = [key for group in state_dict["param_groups"] for key in group["params"]]
        states = [state_dict["state"].get(key, {}) for key in params]
        keys = self.loadable_keys or self.keys
        self._loaded = [{k: state[k] for k in keys if k in state} for state in states]

    def _after_load(self, optimizer: Optimizer) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for p, loaded in zip(params, self._loaded, strict=True):
            if loaded:
                for key in loaded:
                    del optimizer.state[p][key]
                optimizer.state[p].update(self.restore(p, loaded))
        self._loaded = []

    def restore(self, p: Tensor, loaded: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a parameter from those of a checkpoint."""
        return {key: tensor.to(p.device, wide_dtype(p)) for key, tensor in loaded.items()}


def wide_dtype(p: Tensor) -> torch.dtype:
    """Return float32, or the parameter's dtype where that is wider."""
    return torch.promote_types(p.dtype, torch.float32)
