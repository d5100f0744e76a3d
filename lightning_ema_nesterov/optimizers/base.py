"""What the optimizers here share: roles, closures, checks before the first step, exact loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_ema_nesterov.optimizers.from_config import find_module, is_named_in_yaml
from lightning_ema_nesterov.optimizers.roles import ROLES, groups_by_role
from lightning_ema_nesterov.optimizers.shards import is_sharded, local

__all__ = [
    "Group",
    "LeanOptimizer",
    "check_at_least",
    "check_betas",
    "check_fraction",
    "check_rank",
    "check_whole",
]

Group = dict[str, Any]
"""A parameter group."""


class LeanOptimizer(Optimizer):
    """An optimizer whose rule depends on the role of a parameter, with tensors as its only state.

    Args:
        params: Groups with the key ``role``, as :func:`groups_by_role` makes them. A YAML of LitGPT
            that names the optimizer gives ``model.parameters()``: then they are made here.
        defaults: Options of groups that do not have their own.

    Raises:
        ValueError: If a group has no valid ``role``, an option out of its range, or tensors that
            are no matrices where its role needs them.
    """

    exact_keys: ClassVar[tuple[str, ...]] = ()
    """State that keeps its own dtype when it is loaded, whatever the parameter's is."""

    needs_whole_matrices: ClassVar[bool] = False
    """Whether hidden matrices must not be spread over processes."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._check_options(defaults, "")
        module = find_module(params) if is_named_in_yaml() else None
        super().__init__(params if module is None else groups_by_role(module), defaults)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with a role; also later, in the middle of a run."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1], len(self.param_groups) - 1)
        except ValueError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move the parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for idx, group in enumerate(self.param_groups):
            # FSDP1 may have put flat shards in the place of matrices since the start.
            self._check_shapes(group, idx)
            for p in group["params"]:
                # A distributed checkpoint wants an entry of each parameter, if only an empty one.
                self.state.setdefault(p, {})
        self._update()
        return loss

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state; a seed, a norm or a factor keeps the dtype that it has."""
        super().load_state_dict(state_dict)
        ids = [idx for group in state_dict["param_groups"] for idx in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for idx, p in zip(ids, params, strict=True):
            saved = state_dict["state"].get(idx, {})
            for key in self.exact_keys:
                if key in saved:
                    value = saved[key].detach().clone()
                    # Whole numbers are read by the CPU in each step.
                    self.state[p][key] = value.to(p.device if value.is_floating_point() else "cpu")

    def _update(self) -> None:
        """Apply the rule to all parameters that have a gradient, without recording it."""
        raise NotImplementedError

    def _check_options(self, options: Group, of: str) -> None:
        """Check the ranges of options; a child adds its own, and ``of`` says whose they are."""
        check_at_least(f"lr{of}", options["lr"], 0.0)
        check_at_least(f"weight_decay{of}", options.get("weight_decay", 0.0), 0.0)

    def _check_group(self, group: Group, idx: int) -> None:
        """Check a group before the first step; a child adds what its rule needs."""
        where = _name_of(group, idx)
        if group.get("role") not in ROLES:
            raise ValueError(
                f"{where} must have a role, one of {ROLES}, got {group.get('role')!r}. Make the "
                "groups with groups_by_role(model), or add the key 'role' to each."
            )
        self._check_options(group, f" of {where[0].lower()}{where[1:]}")
        self._check_shapes(group, idx)
        spread = [p for p in group["params"] if is_sharded(p)]
        if self.needs_whole_matrices and group["role"] == "hidden" and spread:
            raise ValueError(
                f"{where} must hold whole matrices for {type(self).__name__}, and {len(spread)} "
                f"of {len(group['params'])} are spread over processes (first: shape "
                f"{tuple(spread[0].shape)}). Train with DDP (--strategy ddp)."
            )

    def _check_shapes(self, group: Group, idx: int) -> None:
        if group["role"] == "other":
            return
        flat = [p for p in group["params"] if p.ndim != 2]
        if flat:
            raise ValueError(
                f"{_name_of(group, idx)} must hold matrices, and {len(flat)} of "
                f"{len(group['params'])} have another shape (first: {tuple(flat[0].shape)}). FSDP1 "
                "makes such shards: train with DDP (--strategy ddp) or FSDP2. Give tensors that "
                "are no matrices the role 'other'."
            )

    def _decay_(self, group: Group, params: list[Tensor], lr: float) -> None:
        """Shrink parameters by decoupled weight decay."""
        if group["weight_decay"] != 0:
            torch._foreach_mul_([local(p) for p in params], 1.0 - lr * group["weight_decay"])

    def _with_gradient(self, *roles: str) -> Iterator[tuple[Group, list[Tensor]]]:
        """Go through the groups of some roles, with their parameters that have a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["role"] in roles and params:
                yield group, params


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise unless ``value`` is a number that is at least ``least``."""
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_fraction(name: str, value: float) -> None:
    """Raise unless ``value`` is in [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}.")


def check_betas(name: str, betas: tuple[float, float]) -> None:
    """Raise unless ``betas`` are two numbers in [0, 1)."""
    if len(betas) != 2:
        raise ValueError(f"{name} must be two numbers, got {betas}.")
    for idx, beta in enumerate(betas):
        check_fraction(f"{name}[{idx}]", beta)


def check_whole(name: str, value: object) -> None:
    """Raise unless ``value`` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value}.")


def check_rank(group: Group, idx: int) -> None:
    """Raise unless the hidden matrices of a group are at least as large as its rank."""
    if group["role"] != "hidden":
        return
    small = [p for p in group["params"] if min(p.shape) < group["rank"]]
    if small:
        raise ValueError(
            f"rank of {_name_of(group, idx)} must be at most the smaller side of each matrix, got "
            f"{group['rank']}, and {len(small)} of {len(group['params'])} matrices are smaller "
            f"(first: {tuple(small[0].shape)}). Lower it, or give them a group with a rank of its "
            "own or with the role 'other' (plain AdamW)."
        )


def _name_of(group: Group, idx: int) -> str:
    """Return how messages call a group."""
    return f"Parameter group {idx} (role {group.get('role')!r})"
