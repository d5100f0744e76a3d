"""Moves of the parameters at the calls of one module, in a training loop of anyone's.

A training forward pass moves to the lookahead point. Any other look at the module in the middle of
a window (an evaluation, ``state_dict``) is bracketed: it sees the iterate, and afterwards the
parameters hold the lookahead point again, bit for bit, so that a backward pass that follows is the
one of the training forward pass.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from lightning_ema_nesterov.core.lookahead import Lookahead

__all__ = ["ModuleHooks"]


class ModuleHooks:
    """Brackets the forward passes and the state of a module for one :class:`Lookahead`.

    Args:
        lookahead: What moves the parameters.
        average_share: Where a forward pass that does not train is evaluated: the share of the way
            from the iterate to the average; ``None``: at the iterate.

    Attributes:
        is_held: Whether the owner moved to the lookahead point: a forward pass in evaluation mode
            is then one of training.
    """

    def __init__(self, lookahead: Lookahead, average_share: float | None = None) -> None:
        self.is_held = False
        self._lookahead = lookahead
        self._average_share = average_share
        self._looks: list[ExitStack | None] = []  # one for each forward pass that is running
        self._states: list[bool] = []  # of the running calls of state_dict: likewise

    def register(
        self, called: Iterable[nn.Module], owners: Iterable[nn.Module]
    ) -> list[RemovableHandle]:
        """Register the hooks.

        Args:
            called: Modules whose forward passes count.
            owners: Modules that are asked for the state; with all of their parts.
        """
        handles: list[RemovableHandle] = []
        for m in called:
            # FSDP2 gathers parameters in a pre-hook of its own, and this one has to come first.
            handles += [
                m.register_forward_pre_hook(_Hook(m, self._before_forward), prepend=True),
                m.register_forward_hook(_Hook(m, self._after_forward), always_call=True),
            ]
        for m in {part for owner in owners for part in owner.modules()}:
            before = _register(m, "state_dict_pre", self._before_state)
            # FSDP (1) gathers parameters in a hook of its own, too late to change them.
            hooks = cast("OrderedDict[int, Any]", m._state_dict_pre_hooks)
            hooks.move_to_end(before.id, last=False)
            handles += [
                before,
                _register(m, "state_dict_post", self._after_state),
                _register(m, "load_state_dict_pre", self._before_load),
            ]
        return handles

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and (module.training or self.is_held):
            self._looks.append(None)
            self._lookahead.extrapolate()
        else:
            self._looks.append(self._look())

    def _look(self) -> ExitStack | None:
        lookahead, share = self._lookahead, self._average_share
        if lookahead.is_at_average or (share is None and not lookahead.is_open):
            return None  # the parameters are where they should be
        look = ExitStack()
        look.enter_context(lookahead.at_iterate() if share is None else lookahead.at_average(share))
        return look

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        look = self._looks.pop() if self._looks else None
        if look is not None:
            look.close()
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(_refuse)  # type: ignore[no-untyped-call]  # of torch

    def _before_state(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if not prefix:
            self._states.clear()  # of a call that raised
        self._states.append(self._lookahead.is_open)
        self._lookahead.pause()

    def _after_state(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
    ) -> None:
        if self._states and self._states.pop():
            for key, value in state_dict.items():
                state_dict[key] = tree_map(_copy, value)  # not views of what goes on moving
            self._lookahead.resume()

    def _before_load(self, module: nn.Module, *args: Any) -> None:
        self._lookahead.retract()


class _Hook:
    """Calls an action for the module that it was made for; copies of the module have none.

    Args:
        module: The module.
        action: Called with the module and whatever the hook is called with.
    """

    def __init__(self, module: nn.Module, action: Callable[..., None]) -> None:
        self._module = weakref.ref(module)
        self._action = action

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if module is self._module():
            self._action(module, *args)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _do_nothing_hook, ()  # for copy.deepcopy and pickle


def _register(module: nn.Module, kind: str, action: Callable[..., None]) -> RemovableHandle:
    register: Callable[..., RemovableHandle] = getattr(module, f"register_{kind}_hook")
    return register(_Hook(module, action))


def _do_nothing_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*args: Any) -> None:
    return


def _refuse(gradient: Tensor) -> Tensor:
    raise RuntimeError(
        "A backward pass must not go through a forward pass in evaluation mode that was evaluated "
        "elsewhere than where the parameters are now: between a training forward pass and the "
        "optimizer's step at the iterate, or at the average. Use train(), or call extrapolate() of "
        "the handle before the first forward pass to train in evaluation mode."
    )


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    for shard in getattr(value, "local_shards", list)():  # a ShardedTensor of FSDP (1)
        shard.tensor = shard.tensor.detach().clone()
    return value
