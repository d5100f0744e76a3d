"""Muon and its relatives on the hidden matrices, another optimizer on everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_ema_nesterov.optimizers.from_config import build_optimizer, find_module, yaml_key
from lightning_ema_nesterov.optimizers.per_role import OptimizerPerRole
from lightning_ema_nesterov.optimizers.roles import ROLES, groups_by_role
from lightning_ema_nesterov.rules.ema import STEP_SIZE_KEY

__all__ = ["by_role", "set_step_sizes"]


def by_role(
    params: ParamsT,
    hidden_matrices: str | dict[str, Any],
    others: str | dict[str, Any],
    fused: bool = False,
) -> Optimizer:
    """Return one optimizer for the hidden matrices and another for all other parameters, as one.

    .. code-block:: yaml

        class_path: lightning_ema_nesterov.litgpt.by_role
        init_args:
          hidden_matrices: {class_path: torch.optim.Muon, init_args: {lr: 0.02, weight_decay: 0}}
          others: {class_path: torch.optim.AdamW, init_args: {lr: 0.003, weight_decay: 0}}

    The hidden matrices are those of :func:`~lightning_ema_nesterov.optimizers.groups_by_role`.
    Embeddings, tied to the head or not, the head, biases and the weights of norms are the others.
    What went where is printed once.

    LitGPT's learning rate is that of ``hidden_matrices``; ``others`` keeps its ratio to it.

    Args:
        params: What LitGPT gives: ``model.parameters()``.
        hidden_matrices: Name of the optimizer, or its ``class_path`` and ``init_args``.
        others: The same.
        fused: Passed to the optimizers that know it; LitGPT sets it on CUDA.

    Raises:
        RuntimeError: If the model cannot be found, or holds flat shards of its matrices.
        TypeError: If an argument does not name an optimizer.
        ValueError: If a learning rate is not above 0, or the embedding or the head is not found.
    """
    module = find_module(params)
    if module is None:
        raise RuntimeError(
            "by_role tells parameters apart by their module and cannot find it. Give it "
            "model.parameters() as it is, not a list."
        )
    groups = groups_by_role(module)
    roles = {
        group["role"]: dict(zip(names, group["params"], strict=True))
        for group, names in zip(groups, groups.names, strict=True)
    }
    hidden = roles.get("hidden", {})
    # Their order is the model's: it is that of the state in a checkpoint.
    rest = [p for p in module.parameters() if all(p is not q for q in hidden.values())]
    if not hidden or not rest:
        raise ValueError(
            f"by_role needs hidden matrices and other parameters, and this model has {len(hidden)} "
            f"and {len(rest)}. Name one optimizer for all of them."
        )
    _check_shapes(hidden)
    # The Muons of pytorch_optimizer want to be told that a group is not for their AdamW.
    for_hidden = [{"params": [*hidden.values()], "use_muon": True}]
    optimizers = [
        build_optimizer(hidden_matrices, for_hidden, key=yaml_key("hidden_matrices"), fused=fused),
        build_optimizer(others, rest, key=yaml_key("others"), fused=fused),
    ]
    rank_zero_info(_describe(roles, *(type(optimizer).__name__ for optimizer in optimizers)))
    return OptimizerPerRole(optimizers)


def _check_shapes(hidden: Mapping[str, nn.Parameter]) -> None:
    flat = [name for name, p in hidden.items() if p.ndim != 2]
    if flat:
        raise RuntimeError(
            f"{len(flat)} of {len(hidden)} hidden matrices are flat shards (first: {flat[0]!r}), "
            "as FSDP1 makes them and LitGPT uses on several devices, and Muon or SOAP need whole "
            "matrices. Train with `ema-nesterov pretrain --strategy ddp` or `--strategy fsdp2`, on "
            "one device, or with AdamW."
        )


def _describe(
    roles: Mapping[str, Mapping[str, nn.Parameter]], for_hidden: str, for_others: str
) -> str:
    lines = ["Roles of the parameters:"]
    for role, params in roles.items():
        optimizer = for_hidden if role == "hidden" else for_others
        lines.append(
            f"  {role}: {len(params)} with {sum(p.numel() for p in params.values()):,} elements, "
            f"{optimizer} (first: {next(iter(params))})"
        )
    return "\n".join(lines)


def set_step_sizes(
    optimizer: Optimizer, module: nn.Module | None, by_role: Mapping[str, float], *, argument: str
) -> None:
    """Give parameters of some roles a peak lookahead step size of their own, in their groups.

    Groups whose parameters differ in it are split; the parts keep all options.

    Args:
        optimizer: A new optimizer of the module's parameters.
        module: The module; ``None`` where it could not be found.
        by_role: Step sizes by the roles of
            :func:`~lightning_ema_nesterov.optimizers.groups_by_role`.
        argument: Where these come from, for messages.

    Raises:
        RuntimeError: If there is no module.
        ValueError: If a role is unknown, or no parameter has any of the roles.

    Example:
        >>> import torch
        >>> model = nn.ModuleDict({"wte": nn.Embedding(9, 4), "up": nn.Linear(4, 6, bias=False)})
        >>> model["lm_head"] = nn.Linear(6, 9, bias=False)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> set_step_sizes(optimizer, model, {"embedding": 0.0}, argument="by_role")
        >>> [(len(g["params"]), g.get("lookahead_step_size")) for g in optimizer.param_groups]
        [(1, 0.0), (2, None)]
    """
    unknown = [role for role in by_role if role not in ROLES]
    if unknown:
        raise ValueError(f"{argument} must have roles, {ROLES}, as its keys, got {unknown[0]!r}.")
    if module is None:
        raise RuntimeError(
            f"{argument} tells parameters apart by their module, which cannot be found. Give the "
            "optimizer model.parameters() as it is, not a list."
        )
    roles = {p: group["role"] for group in groups_by_role(module) for p in group["params"]}
    if not set(by_role) & set(roles.values()):
        raise ValueError(
            f"{argument} must name a role that parameters have, got {', '.join(by_role)}; this "
            f"model has {', '.join(dict.fromkeys(roles.values()))}."
        )
    split: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parts: dict[float | None, list[nn.Parameter]] = {}
        for p in group["params"]:
            parts.setdefault(by_role.get(roles.get(p, "")), []).append(p)
        for step_size, params in parts.items():
            own = {} if step_size is None else {STEP_SIZE_KEY: step_size}
            split.append({**group, "params": params, **own})
    optimizer.param_groups[:] = split
