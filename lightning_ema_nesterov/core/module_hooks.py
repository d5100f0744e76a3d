"""Moves of the parameters at the calls of one module, in a training loop of anyone's.

A training forward pass moves to the lookahead point. Any other look at the module in the middle of
a window (an evaluation, ``state_dict``) is bracketed: it sees the iterate, and afterwards the
parameters hold the lookahead point again, bit for bit, so that a backward pass that follows is the
one of the training forward pass.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from lightning_ema_nesterov.core.frames import num_running
from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.module_hook import EagerModuleHook, ModuleHook

__all__ = ["ModuleHooks"]

_WHY_NOT_COMPILED = (
    "attach_ema_nesterov moves parameters outside of the graph; for fullgraph=True attach to what "
    "torch.compile returns"
)
_NO_BACKWARD = -1  # the id of the backward pass that is running, outside of one
_CALL, _STATE = nn.Module._call_impl.__code__, nn.Module.state_dict.__code__


def _not_compiled(method: Any) -> Any:
    known = inspect.signature(torch.compiler.disable).parameters  # torch 2.6 takes no reason
    kwargs: dict[str, Any] = {"reason": _WHY_NOT_COMPILED} if "reason" in known else {}
    disable: Any = torch.compiler.disable
    return disable(**kwargs)(method)


class _Look(NamedTuple):
    """A forward pass that is running: of what, how to come back from where it moved, and where."""

    module: nn.Module
    moved: ExitStack | None
    thread: int


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
        self._looks: list[_Look] = []
        self._is_at_iterate = False
        # Of the running calls of state_dict: whether a window was open, and whether tensors move.
        self._states: list[tuple[bool, bool]] = []

    def register(
        self, called: Iterable[nn.Module], owners: Iterable[nn.Module]
    ) -> list[RemovableHandle]:
        """Register the hooks.

        Args:
            called: Modules whose forward passes count, and what they wrap. None, where the owner
                of ``lookahead`` calls it: then only the state is bracketed.
            owners: Modules that are asked for the state; with all of their parts.
        """
        handles: list[RemovableHandle] = []
        outer = set(called)
        for m in outer.union(*map(_wrapped_by, outer)):
            # In the graph that torch.compile makes of a wrapper, the wrapper's hooks have come.
            kind = ModuleHook if m in outer else EagerModuleHook
            # FSDP2 gathers parameters in a pre-hook of its own, and this one has to come first.
            handles += [
                m.register_forward_pre_hook(kind(m, self, "_before_forward"), prepend=True),
                m.register_forward_hook(kind(m, self, "_after_forward"), always_call=True),
            ]
        for m in {part for owner in owners for part in owner.modules()}:
            before = self._register(m, "state_dict_pre", "_before_state")
            # FSDP (1) gathers parameters in a hook of its own, too late to change them.
            hooks = cast("OrderedDict[int, Any]", m._state_dict_pre_hooks)
            hooks.move_to_end(before.id, last=False)
            handles += [
                before,
                self._register(m, "state_dict_post", "_after_state"),
                self._register(m, "load_state_dict_pre", "_before_load"),
            ]
        return handles

    def _register(self, module: nn.Module, kind: str, action: str) -> RemovableHandle:
        register: Callable[..., RemovableHandle] = getattr(module, f"register_{kind}_hook")
        return register(ModuleHook(module, self, action))

    def check_copy(self) -> None:
        """Raise where a copy of the module would not be one of the iterate.

        Raises:
            RuntimeError: Between a training forward pass and the optimizer's step, and after an
                evaluation that was interrupted.
        """
        if self._leave_interrupted_looks():
            raise RuntimeError(
                "The copy of the module holds the average: the evaluation before it was "
                "interrupted. The parameters hold the iterate again; copy once more."
            )
        if self._lookahead.is_open:
            raise RuntimeError(
                "A module that looks ahead must not be copied or pickled between a training "
                "forward pass and the optimizer's step: its parameters hold the lookahead point. "
                "Do it after the step, or inside of at_iterate() of what attach_ema_nesterov "
                "returned."
            )

    def extrapolate(self) -> None:
        """Move to the lookahead point, where no forward pass of the module does it.

        Raises:
            RuntimeError: Inside of :meth:`at_iterate`, or if the parameters hold the average.
        """
        self._check_not_at_iterate()
        self.is_held = True
        self._lookahead.extrapolate()

    @contextmanager
    def at_average(self, share: float) -> Iterator[None]:
        """Hold the parameters at the average inside a ``with`` block."""
        self._leave_interrupted_looks()
        with self._lookahead.at_average(share):
            yield

    @contextmanager
    def at_iterate(self) -> Iterator[None]:
        """Hold the parameters at the iterate inside a ``with`` block, also in evaluations."""
        self._leave_interrupted_looks()
        was_at_iterate, self._is_at_iterate = self._is_at_iterate, True
        try:
            with self._lookahead.at_iterate():
                yield
        finally:
            self._is_at_iterate = was_at_iterate

    def _check_not_at_iterate(self) -> None:
        if self._is_at_iterate:
            raise RuntimeError(
                "A training forward pass must not run inside of at_iterate(): it moves the "
                "parameters to the lookahead point. Use eval() or torch.no_grad() there."
            )

    @_not_compiled
    def _before_forward(self, module: nn.Module, args: Any) -> None:
        self._leave_interrupted_looks(module)
        if torch.is_grad_enabled() and (module.training or self.is_held):
            self._check_not_at_iterate()
            self._looks.append(_Look(module, None, threading.get_ident()))
            if not self._lookahead.is_open and torch._C._current_graph_task_id() != _NO_BACKWARD:
                raise RuntimeError(
                    "The first training forward pass of a step must not run inside of a backward "
                    "pass, as under checkpoint(module, ..., use_reentrant=True): what went before "
                    "it was evaluated elsewhere. Use use_reentrant=False, or checkpoint parts of "
                    "the module."
                )
            self._lookahead.extrapolate()
        else:
            self._looks.append(_Look(module, self._look(), threading.get_ident()))

    def _look(self) -> ExitStack | None:
        lookahead, share = self._lookahead, self._average_share
        if self._is_at_iterate:
            return None
        if lookahead.is_at_average or (share is None and not lookahead.is_open):
            return None  # the parameters are where they should be
        look = ExitStack()
        look.enter_context(lookahead.at_iterate() if share is None else lookahead.at_average(share))
        return look

    def _leave_interrupted_looks(self, *called: nn.Module) -> bool:
        """Come back from looks in forward passes that Ctrl-C ended: torch calls no hook then.

        Args:
            called: The module whose call has just begun.

        Returns:
            Whether there were any.
        """
        thread = threading.get_ident()
        looks = [look for look in self._looks if look.thread == thread]
        modules = {*called, *(look.module for look in looks)}
        if all(look.moved is None for look in looks) or (
            num_running(_CALL, lambda its: its["self"] in modules) > len(called)
        ):
            return False
        for look in reversed(looks):
            self._looks.remove(look)
            if look.moved is not None:
                look.moved.close()
        return True

    @_not_compiled
    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        look = self._looks.pop().moved if self._looks else None
        if look is not None:
            look.close()
        elif not self._lookahead.is_open:
            return  # nothing moves
        check = self._check_backward if look is None else _refuse
        for leaf in tree_leaves(output):
            # A parameter that is put out as it is would keep the hook.
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                leaf.register_hook(check)  # type: ignore[no-untyped-call]  # of torch

    def _check_backward(self, gradient: Tensor) -> None:
        if self._lookahead.is_paused:
            raise RuntimeError(
                "The backward pass of a training forward pass must not run while the parameters "
                "hold the iterate: inside of at_iterate(), or after a look at them (state_dict(), "
                "an evaluation) that raised. Repeat the forward pass."
            )

    def _before_state(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if num_running(_STATE, lambda its: True) == 1:
            self._leave_interrupted_looks()
            self._states.clear()  # of a call that raised
        lookahead, was_open = self._lookahead, self._lookahead.is_open
        self._states.append((was_open, was_open or lookahead.is_paused or lookahead.is_at_average))
        lookahead.pause()

    def _after_state(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
    ) -> None:
        was_open, moves_on = self._states.pop() if self._states else (False, False)
        # Of the outermost call, which has all: each part is handed what came before it too.
        if moves_on and not self._states:
            for key, value in state_dict.items():
                state_dict[key] = tree_map(_copy, value)  # not views
        if was_open:
            self._lookahead.resume()

    def _before_load(self, module: nn.Module, *args: Any) -> None:
        self._leave_interrupted_looks()
        lookahead = self._lookahead
        if lookahead.is_open:
            lookahead.sharding.drop_copies()
            # A frozen part, as a target network, may be loaded before the backward pass.
            if not lookahead.rule.store.has_params_of(module):
                return
        lookahead.retract()


def _wrapped_by(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules inside of DDP and torch.compile, which can be called by themselves."""
    inner = getattr(module, "_orig_mod", None)
    if isinstance(module, DistributedDataParallel):
        inner = module.module
    if isinstance(inner, nn.Module):
        yield inner
        yield from _wrapped_by(inner)


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
