"""What each parameter of a language model is: hidden matrix, embedding, head or something else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

__all__ = ["ROLES", "RoleGroups", "groups_by_role"]

ROLES = ("hidden", "embedding", "head", "other")
"""What a parameter can be."""

_HEAD_NAMES = ("lm_head", "head", "output", "embed_out")
_WRAPPERS = {"_forward_module", "_orig_mod", "_fsdp_wrapped_module", "module"}
_REMEDY = (
    "Pass roles={NAME: ROLE} with the name of the parameter, or groups of your own: "
    "[{'params': [...], 'role': 'head'}, ...]."
)


class RoleGroups(list[dict[str, Any]]):
    """Parameter groups with the key ``role``; printed, they list the parameters of each role.

    Attributes:
        names: For each group, the names of its parameters, in the same order.
    """

    def __init__(self, named: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
        used = {role: params for role, params in named.items() if params}
        super().__init__({"params": [*p.values()], "role": role} for role, p in used.items())
        self.names = [[*params] for params in used.values()]

    @override
    def __str__(self) -> str:
        lines = []
        for group, names in zip(self, self.names, strict=True):
            size = sum(p.numel() for p in group["params"])
            lines.append(f"{group['role']}: {len(names)} parameters, {size:,} elements")
            lines += [
                f"  {name} {tuple(p.shape)}" for name, p in zip(names, group["params"], strict=True)
            ]
        return "\n".join(lines)


def groups_by_role(module: nn.Module, *, roles: Mapping[str, str] | None = None) -> RoleGroups:
    """Return parameter groups with the key ``role``, for the optimizers of this package.

    * ``hidden``: all matrices that are none of the next two;
    * ``embedding``: the weight of each ``nn.Embedding`` (rows are tokens or positions);
    * ``head``: the weight of the linear layer that gives the logits (rows are tokens). An embedding
      that is tied to it is here: the head's rule is the one with momentum;
    * ``other``: gains, biases, and tensors of three and more dimensions.

    The head is the linear layer with as many outputs as an embedding has rows. If there are
    several or none of them, it is the one whose last name is ``lm_head``, ``head``, ``output`` or
    ``embed_out``; that name comes first where embeddings differ in their rows. Parameters that need
    no gradient are left out. Modules decide, not shapes alone: FSDP1's flat shard of a matrix keeps
    its role, and the optimizers refuse it.

    Args:
        module: The model, wrapped or not. Print the result to see what went where.
        roles: Role by parameter name, for what is not found or found wrongly.

    Returns:
        A list of groups, one for each role that has parameters, in this order.

    Raises:
        ValueError: If the embedding or the head cannot be found, or if ``roles`` has an unknown
            name or role.

    Example:
        >>> model = nn.ModuleDict({"wte": nn.Embedding(9, 4), "up": nn.Linear(4, 6, bias=False)})
        >>> model["lm_head"] = nn.Linear(6, 9)
        >>> print(groups_by_role(model))
        hidden: 1 parameters, 24 elements
          up.weight (6, 4)
        embedding: 1 parameters, 36 elements
          wte.weight (9, 4)
        head: 1 parameters, 54 elements
          lm_head.weight (9, 6)
        other: 1 parameters, 9 elements
          lm_head.bias (9,)
    """
    names = {p: _plain(name) for name, p in module.named_parameters()}
    _check_flat(names)
    given = dict(roles or {})
    _check_given(given, names.values())
    found = _roles_of(module, names, given)
    named: dict[str, dict[str, nn.Parameter]] = {role: {} for role in ROLES}
    for p, name in names.items():
        if p.requires_grad:
            named[given.get(name, found[p])][name] = p
    return RoleGroups(named)


def _roles_of(
    module: nn.Module, names: Mapping[nn.Parameter, str], given: Mapping[str, str]
) -> dict[nn.Parameter, str]:
    layers = [(_plain(name), m) for name, m in module.named_modules()]
    embeddings = {m.weight: m.num_embeddings for _, m in layers if isinstance(m, nn.Embedding)}
    linear = {m.weight: (name, m.out_features) for name, m in layers if isinstance(m, nn.Linear)}
    if not embeddings and "embedding" not in given.values():
        raise ValueError(
            f"The embedding must be an nn.Embedding, and {type(module).__name__} has none. "
            f"{_REMEDY}"
        )
    heads: set[Tensor] = set()
    if "head" not in given.values():
        heads = {p for p in embeddings if p in linear}
        heads = heads or {_find_head(module, linear, set(embeddings.values()))}

    def role_of(p: nn.Parameter) -> str:
        if p in heads:
            return "head"
        if p in embeddings:
            return "embedding"
        return "hidden" if p in linear or p.ndim == 2 else "other"

    return {p: role_of(p) for p in names}


def _find_head(
    module: nn.Module, linear: Mapping[Tensor, tuple[str, int]], sizes: set[int]
) -> Tensor:
    by_size = [p for p, (_, outputs) in linear.items() if outputs in sizes]
    by_name = [p for p, (name, _) in linear.items() if name.rpartition(".")[2] in _HEAD_NAMES]
    both = [p for p in by_size if any(p is q for q in by_name)]
    # With several sizes a hidden layer may be as wide as a table of positions, by chance.
    order = (both, by_size, by_name) if len(sizes) == 1 else (both, by_name, by_size)
    for candidates in order:
        if len(candidates) == 1:
            return candidates[0]
    candidates = both or by_size or by_name
    listed = ", ".join(repr(linear[p][0]) for p in candidates[:4]) or "none"
    raise ValueError(
        f"The head must be one linear layer with as many outputs as the embedding has rows, "
        f"{sorted(sizes)}, or be named {', '.join(_HEAD_NAMES)}; {type(module).__name__} has "
        f"{len(candidates)} such layers ({listed}). {_REMEDY}"
    )


def _check_given(given: Mapping[str, str], names: Iterable[str]) -> None:
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(
            f"roles must name parameters of the module, got {unknown[0]!r}. Names are those of "
            "module.named_parameters(), without the prefixes of wrappers."
        )
    for name, role in given.items():
        if role not in ROLES:
            raise ValueError(f"roles[{name!r}] must be one of {ROLES}, got {role!r}.")


def _check_flat(names: Mapping[nn.Parameter, str]) -> None:
    flat = [name for p, name in names.items() if getattr(p, "_is_flat_param", False)]
    if flat:
        raise ValueError(
            f"Parameters must be those of the layers, and {len(flat)} are flat parameters of FSDP1 "
            f"(first: {flat[0]!r}) that hold several layers each. Train with DDP or FSDP2."
        )


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
