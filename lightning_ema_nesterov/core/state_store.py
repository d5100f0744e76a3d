"""Where a lookahead rule keeps its tensors: in the base optimizer's own state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["StateStore", "wide_dtype"]

State = dict[str, Tensor]


class StateStore:
    """Tensors in ``base_optimizer.state[p]``, under the keys of one rule.

    Each tensor is placed like its parameter, so that every strategy saves, gathers and reshards it.
    A parameter gets its tensors after its first step: most base optimizers take a parameter with
    any state for one that they have initialised.

    Args:
        base_optimizer: The optimizer whose state holds the tensors.
        keys: Names of the tensors of a parameter. The first is in every parameter that has any.
        loadable_keys: Names that are read from a checkpoint.

    Raises:
        TypeError: If ``base_optimizer`` is not a ``torch.optim.Optimizer``.
        ValueError: If it is a ``ZeroRedundancyOptimizer``.
    """

    def __init__(
        self, base_optimizer: Optimizer, keys: Sequence[str], loadable_keys: Sequence[str] = ()
    ) -> None:
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(
                "base_optimizer must be a torch.optim.Optimizer, got "
                f"{type(base_optimizer).__module__}.{type(base_optimizer).__qualname__}."
            )
        names = {cls.__name__ for cls in type(base_optimizer).__mro__}
        if "ZeroRedundancyOptimizer" in names:
            raise ValueError(
                "base_optimizer must save its own state, and ZeroRedundancyOptimizer saves that of "
                "another one: directions would be lost. Shard with FSDP2, or train with DDP."
            )
        self.base_optimizer = base_optimizer
        self.keys = tuple(keys)
        self._loadable_keys = tuple(loadable_keys) or self.keys
        self._loaded: list[State] = []
        self._aside: dict[Tensor, State] = {}

    def all_params(self) -> list[Tensor]:
        """Return all parameters of the base optimizer, in its order."""
        return [p for group in self.base_optimizer.param_groups for p in group["params"]]

    def num_changes(self) -> dict[Tensor, int]:
        """Return how often each parameter was changed in place, as far as autograd counts.

        It does not count what a fused optimizer does. Those that count their own steps, as Adam
        does, change that number right before.
        """
        counts = {}
        for group in self.base_optimizer.param_groups:
            for p in group["params"]:
                state = self.base_optimizer.state.get(p, {}) if group.get("fused") else {}
                step = state.get("step")
                counts[p] = p._version + (step._version if isinstance(step, Tensor) else 0)
        return counts

    def has(self, p: Tensor) -> bool:
        """Return whether a parameter has its tensors."""
        return self.keys[0] in self.state_of(p)

    def state_of(self, p: Tensor) -> State:
        """Return the state that holds a parameter's tensors, to be read; empty if there is none."""
        # `state` is a defaultdict: indexing it would give every parameter an empty state.
        state: State = self._aside.get(p) or self.base_optimizer.state.get(p, {})
        return state

    def known_params(self) -> list[Tensor]:
        """Return all parameters that have their tensors."""
        return [p for p in self.all_params() if self.has(p)]

    def has_params_of(self, module: nn.Module) -> bool:
        """Return whether a module holds parameters of the optimizer, and no gathered copies."""
        own = set(module.parameters())
        return any(p in own for p in self.all_params())

    def column(self, params: Iterable[Tensor], key: str = "") -> list[Tensor]:
        """Return one tensor of each parameter; without a key the first."""
        return [self.state_of(p)[key or self.keys[0]] for p in params]

    def tensors(self, params: Iterable[Tensor]) -> list[Tensor]:
        """Return every tensor that parameters have."""
        states = [self.state_of(p) for p in params]
        return [state[key] for state in states for key in self.keys if key in state]

    def put(self, p: Tensor, state: State) -> None:
        """Set tensors of a parameter."""
        (self._aside[p] if p in self._aside else self.base_optimizer.state[p]).update(state)

    def set_aside(self, params: Iterable[Tensor]) -> None:
        """Keep tensors out of the optimizer's state, so that it can find one that is empty."""
        for p in params:
            if self.has(p):
                state = self.base_optimizer.state[p]
                self._aside[p] = {key: state.pop(key) for key in self.keys if key in state}

    def bring_back(self) -> None:
        """Put back into the optimizer's state what :meth:`set_aside` took out."""
        for p, state in self._aside.items():
            self.base_optimizer.state[p].update(state)
        self._aside = {}

    def follow_params(self) -> None:
        """Move the tensors to the devices of their parameters: the Trainer moves them after fit."""
        for p in self.known_params():
            state = self.base_optimizer.state[p]
            state.update({key: state[key].to(p.device) for key in self.keys if key in state})

    def drop(self, p: Tensor) -> None:
        """Remove the tensors of a parameter."""
        state = self.base_optimizer.state.get(p, {})
        for key in self.keys:
            state.pop(key, None)
        if not state:
            self.base_optimizer.state.pop(p, None)

    def fill_stepped(self, make_state: Callable[[Tensor], State]) -> None:
        """Give tensors to all parameters with a gradient, as a step does.

        Args:
            make_state: Returns the tensors of a parameter that has not moved yet.
        """
        for p in self.all_params():
            if p.grad is not None and not self.has(p):
                self.put(p, make_state(p))

    def fill_missing(self, make_state: Callable[[Tensor], State]) -> None:
        """Give tensors to parameters that had no gradient, where a checkpoint needs them.

        A distributed checkpoint is read into what a step with all gradients leaves. Where the base
        optimizer has no state of its own, a parameter without a gradient needs ours.

        Args:
            make_state: Returns the tensors of a parameter that has not moved yet.
        """
        missing = [p for p in self.all_params() if p.requires_grad and not self.has(p)]
        states = self.base_optimizer.state.values()
        own = set(self.keys)
        # With no state at all nothing is known: the optimizer may still make its own.
        if (
            missing
            and states
            and all(self.keys[0] in state and own.issuperset(state) for state in states)
        ):
            for p in missing:
                self.put(p, make_state(p))

    def take_up(self, restore: Callable[[Tensor, State], State]) -> None:
        """Convert tensors that are in the optimizer's state already.

        A checkpoint that was loaded before the method was attached is rounded to the dtypes of the
        parameters, and a former method may have stored them in another format.

        Args:
            restore: As for :meth:`restore_on_load`.
        """
        for p in self.known_params():
            state = self.base_optimizer.state[p]
            found = {key: state.pop(key) for key in self._loadable_keys if key in state}
            self.put(p, restore(p, found))

    def restore_on_load(self, restore: Callable[[Tensor, State], State]) -> list[RemovableHandle]:
        """Register hooks: ``load_state_dict`` rounds every state to its parameter's dtype.

        Args:
            restore: Returns the tensors of a parameter from those of a checkpoint.
        """

        def before_load(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
            # By position, as `load_state_dict` matches parameters: their keys can be names.
            params = [key for group in state_dict["param_groups"] for key in group["params"]]
            states = [state_dict["state"].get(key, {}) for key in params]
            self._loaded = [
                {key: state[key] for key in self._loadable_keys if key in state} for state in states
            ]

        def after_load(optimizer: Optimizer) -> None:
            for p, loaded in zip(self.all_params(), self._loaded, strict=True):
                if loaded:
                    for key in loaded:
                        del optimizer.state[p][key]
                    self.put(p, restore(p, loaded))
            self._loaded = []

        return [
            self.base_optimizer.register_load_state_dict_pre_hook(before_load),
            self.base_optimizer.register_load_state_dict_post_hook(after_load),
        ]


def wide_dtype(p: Tensor) -> torch.dtype:
    """Return float32, or the parameter's dtype where that is wider."""
    return torch.promote_types(p.dtype, torch.float32)
