"""Turn the linear layers of a model into layers of low rank, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from lightning_ema_nesterov.low_rank.layers import LowRankLinear
from lightning_ema_nesterov.optimizers.roles import groups_by_role

__all__ = ["to_dense_", "to_low_rank_"]


def to_low_rank_(
    module: nn.Module,
    *,
    rank: int,
    alpha: float = 32.0,
    sparsity: float = 0.0,
    layers: Iterable[str] | None = None,
) -> list[str]:
    """Replace linear layers of a model by layers of low rank, in place.

    Call it before the optimizer is made and before the model is wrapped for several devices. The
    new weights are drawn anew: the method is one for pretraining. A bias is kept.

    Args:
        module: The model.
        rank: Rank of each new layer, from 1 to the smaller side of each weight.
        alpha: Scale of each product, above 0.
        sparsity: Share of the entries that are trained besides, in [0, 1).
        layers: Names of the layers, as ``module.named_modules()`` has them. By default all
            ``nn.Linear`` but the head, as :func:`~lightning_ema_nesterov.optimizers.groups_by_role`
            finds it; in a model without an embedding all.

    Returns:
        The names of the layers that were replaced.

    Raises:
        ValueError: If there is no such layer, if two layers share a weight, or if an argument is
            out of its range. Nothing is replaced then.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9))
        >>> to_low_rank_(model, rank=2)
        ['1']
        >>> model[1]
        LowRankLinear(in_features=6, out_features=6, rank=2, alpha=32.0, sparsity=0.0, bias=True)
    """
    found = _find(module, layers)
    new: dict[str, nn.Module] = {}
    for name, linear in found.items():
        try:
            new[name] = _low_rank(linear, rank, alpha, sparsity)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error} Leave a layer out with `layers`.") from None
    _replace(module, {found[name]: layer for name, layer in new.items()})
    return [*new]


def to_dense_(module: nn.Module) -> list[str]:
    """Replace layers of low rank by ``nn.Linear`` with the same weight, in place.

    So that a trained model is used where nobody knows of low rank. Their parameters are new.

    Args:
        module: The model.

    Returns:
        The names of the layers that were replaced.

    Example:
        >>> model = nn.Sequential(LowRankLinear(4, 3, rank=2))
        >>> to_dense_(model)
        ['0']
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
        )
    """
    found = {name: m for name, m in module.named_modules() if isinstance(m, LowRankLinear)}
    new: dict[nn.Module, nn.Module] = {}
    for layer in found.values():
        options = {"device": layer.B.device, "dtype": layer.B.dtype}
        linear = nn.Linear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, **options
        )
        with torch.no_grad():
            linear.weight.copy_(layer.dense_weight())
            if layer.bias is not None:
                linear.bias.copy_(layer.bias)
        new[layer] = linear.train(layer.training)
    _replace(module, new)
    return [*found]


def _replace(module: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    # A wrapper may have its model twice, under two names.
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if child in new:
                setattr(parent, name, new[child])


def _find(module: nn.Module, layers: Iterable[str] | None) -> Mapping[str, nn.Linear]:
    modules = dict(module.named_modules())
    linear = {name: m for name, m in modules.items() if type(m) is nn.Linear and name}
    if layers is not None:
        wanted = list(layers)
        wrong = [name for name in wanted if name not in linear]
        if wrong or not wanted:
            raise ValueError(
                f"layers must name nn.Linear layers of {type(module).__name__}, got "
                f"{wrong[0] if wrong else 'none'!r}."
            )
        found = {name: linear[name] for name in wanted}
    elif any(isinstance(m, nn.Embedding) for m in modules.values()):
        hidden = {p for g in groups_by_role(module) if g["role"] == "hidden" for p in g["params"]}
        found = {name: m for name, m in linear.items() if m.weight in hidden}
    else:
        found = linear
    if not found:
        raise ValueError(
            f"{type(module).__name__} must have an nn.Linear besides its head, and has none."
        )
    owners = Counter(p for m in modules.values() for p in m.parameters(recurse=False))
    shared = [name for name, m in found.items() if owners[m.weight] > 1]
    if shared:
        raise ValueError(
            f"A layer of low rank must not share its weight, and {len(shared)} of {len(found)} "
            f"layers do (first: {shared[0]!r}). Name the others in `layers`."
        )
    return found


def _low_rank(linear: nn.Linear, rank: int, alpha: float, sparsity: float) -> LowRankLinear:
    layer = LowRankLinear(
        linear.in_features,
        linear.out_features,
        rank=rank,
        alpha=alpha,
        sparsity=sparsity,
        bias=False,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
    layer.bias = linear.bias
    return layer.train(linear.training)
