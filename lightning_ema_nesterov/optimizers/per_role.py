"""Several optimizers as one: another one for each role that parameters have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch.optim import Optimizer
from typing_extensions import override

__all__ = ["OptimizerPerRole"]


class OptimizerPerRole(Optimizer):
    """Several optimizers as one, each made with one parameter group.

    All groups show the learning rate of the first: a trainer that writes one learning rate into all
    groups, as LitGPT does, moves all of them, and each keeps its ratio to the first.

    Args:
        optimizers: Optimizers of disjoint parameters, with one group and an ``lr`` above 0 each.
            They belong to this one afterwards.

    Raises:
        ValueError: If an optimizer has several groups or an ``lr`` that is not above 0.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._optimizers = list(optimizers)
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        if len(groups) != len(self._optimizers):
            raise ValueError(f"Each optimizer must have one parameter group, got {len(groups)}.")
        lrs = [float(group["lr"]) for group in groups]
        if min(lrs) <= 0:
            raise ValueError(f"The learning rate of each role must be above 0, got {lrs}.")
        self._lr_ratios = [lr / lrs[0] for lr in lrs]
        # Whose parameter it is: a group may have been split since.
        self._owners = {p: idx for idx, group in enumerate(groups) for p in group["params"]}
        self._is_made = False
        super().__init__(groups, {"lr": lrs[0]})
        self._is_made = True
        for group in self.param_groups:
            group["lr"] = lrs[0]

    @override
    def __getstate__(self) -> dict[str, Any]:
        own = ("_optimizers", "_lr_ratios", "_owners", "_is_made")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of one of the optimizers; from outside none is.

        Raises:
            RuntimeError: After this optimizer was made: no role is known of a new group.
        """
        if self._is_made:
            raise RuntimeError(
                "OptimizerPerRole must be made with all of its parameters: no optimizer is known "
                "for those of a new group. Give them to the optimizer of their role."
            )
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step all optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for idx, optimizer in enumerate(self._optimizers):
            groups = [g for g in self.param_groups if self._owners[g["params"][0]] == idx]
            # Loading a checkpoint puts new objects in the place of these.
            optimizer.param_groups, optimizer.state = groups, self.state
            lrs = [group["lr"] for group in groups]
            for group in groups:
                group["lr"] = group["lr"] * self._lr_ratios[idx]  # a tensor stays as it is
            try:
                optimizer.step()
            finally:
                for group, lr in zip(groups, lrs, strict=True):
                    group["lr"] = lr
        return loss
