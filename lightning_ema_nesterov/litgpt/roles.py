"""Muon and its relatives on the hidden matrices, another optimizer on everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_ema_nesterov.litgpt.run import find_module
from lightning_ema_nesterov.optimizers.from_config import build_optimizer
from lightning_ema_nesterov.optimizers.per_role import OptimizerPerRole

__all__ = ["by_role", "roles_of"]

_HEADS = ("lm_head", "head", "output")
_WRAPPERS = {"_forward_module", "_orig_mod", "_fsdp_wrapped_module", "module"}


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

    The hidden matrices are the weights of linear layers without the head. Embeddings, tied to the
    head or not, the head, biases and the weights of norms are the others. What went where is
    printed once.

    LitGPT's learning rate is that of ``hidden_matrices``; ``others`` keeps its ratio to it.

    Args:
        params: What LitGPT gives: ``model.parameters()``.
        hidden_matrices: Name of the optimizer, or its ``class_path`` and ``init_args``.
        others: The same.
        fused: Passed to the optimizers that know it; LitGPT sets it on CUDA.

    Raises:
        RuntimeError: If the model cannot be found, or holds flat shards of its matrices.
        TypeError: If an argument does not name an optimizer.
        ValueError: If a learning rate is not above 0.
    """
    module = find_module(params)
    if module is None:
        raise RuntimeError(
            "by_role tells parameters apart by their module and cannot find it. Give it "
            "model.parameters() as it is, not a list."
        )
    roles = roles_of(module)
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
        build_optimizer(hidden_matrices, for_hidden, argument="hidden_matrices", fused=fused),
        build_optimizer(others, rest, argument="others", fused=fused),
    ]
    rank_zero_info(_describe(roles, *(type(optimizer).__name__ for optimizer in optimizers)))
    return OptimizerPerRole(optimizers)


def roles_of(module: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return the parameters of each role by their names.

    The head is a linear layer whose last name is ``lm_head``, ``head`` or ``output``, or that is
    tied to an embedding. The weights of all other linear layers are ``hidden``.

    Example:
        >>> model = nn.ModuleDict({"up": nn.Linear(2, 3), "lm_head": nn.Linear(3, 8, bias=False)})
        >>> {role: [*params] for role, params in roles_of(model).items()}
        {'hidden': ['up.weight'], 'other': ['up.bias'], 'head': ['lm_head.weight']}
    """
    modules = [(name, m) for name, m in module.named_modules() if hasattr(m, "weight")]
    linear = {m.weight: name for name, m in modules if isinstance(m, nn.Linear)}
    embeddings = {m.weight for _, m in modules if isinstance(m, nn.Embedding)}

    def role_of(p: nn.Parameter) -> str:
        if p in linear:
            is_head = p in embeddings or linear[p].rpartition(".")[2] in _HEADS
            return "head" if is_head else "hidden"
        return "embedding" if p in embeddings else "other"

    roles: dict[str, dict[str, nn.Parameter]] = {}
    for name, p in module.named_parameters():
        roles.setdefault(role_of(p), {})[_plain(name)] = p
    return roles


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


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
