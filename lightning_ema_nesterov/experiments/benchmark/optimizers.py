"""The base optimizers that are compared, on LLaMA models of five sizes, at published values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from litgpt import GPT, Config
from pytorch_optimizer import SOAP
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from lightning_ema_nesterov.low_rank import to_low_rank_
from lightning_ema_nesterov.optimizers import (
    APOLLO,
    SCALE,
    ClippedSGD,
    Fira,
    GaLore,
    LoRAPre,
    groups_by_role,
)
from lightning_ema_nesterov.optimizers.per_role import OptimizerPerRole

__all__ = ["OPTIMIZERS", "SIZES", "Size", "known_names", "make_model"]


@dataclass(frozen=True)
class Size:
    """A LLaMA of the papers that compare these optimizers, and the ranks published for it.

    Attributes:
        num_layers: Blocks.
        num_heads: Heads of attention.
        width: Width of the residual.
        mlp_width: Width inside of the MLP.
        galore_rank: Rank of GaLore, and of Fira.
        apollo_rank: Rank of APOLLO.
    """

    num_layers: int
    num_heads: int
    width: int
    mlp_width: int
    galore_rank: int
    apollo_rank: int

    @property
    def lora_pre_rank(self) -> int:
        """An eighth of GaLore's, as LoRA-Pre's authors say."""
        return self.galore_rank // 8

    @property
    def low_rank(self) -> int:
        """A quarter of the width, as the paper on restarts says."""
        return self.width // 4


SIZES: Mapping[str, Size] = {
    "60M": Size(8, 8, 512, 1376, 128, 128),
    "130M": Size(12, 12, 768, 2048, 256, 192),
    "350M": Size(24, 16, 1024, 2736, 256, 256),
    "1B": Size(24, 32, 2048, 5461, 1024, 256),
    "7B": Size(32, 32, 4096, 11008, 1024, 256),
}
"""The sizes by name."""

Make = Callable[[nn.Module, Size], Optimizer]


def make_model(size: Size, device: str, *, num_layers: int | None = None) -> nn.Module:
    """Return a LLaMA as LitGPT builds it, with query, key and value in one matrix.

    Args:
        size: Its size.
        device: Where the parameters are; ``"meta"``: nowhere.
        num_layers: Blocks, instead of those of the size.
    """
    with torch.device(device):
        model: nn.Module = GPT(
            Config(
                block_size=256,
                vocab_size=32_000,
                padded_vocab_size=32_000,
                n_layer=num_layers or size.num_layers,
                n_head=size.num_heads,
                n_embd=size.width,
                intermediate_size=size.mlp_width,
                rotary_percentage=1.0,
                parallel_residual=False,
                bias=False,
                norm_class_name="RMSNorm",
                mlp_class_name="LLaMAMLP",
            )
        )
    return model


def known_names(kind: str, names: Sequence[str], known: Mapping[str, object]) -> list[str]:
    """Return names, and all that are known for ``"all"``.

    Raises:
        ValueError: If one is not known.
    """
    if [*names] == ["all"]:
        return [*known]
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise ValueError(
            f"{kind} must be all or of {', '.join(known)}, got {wrong[0] if wrong else 'none'!r}."
        )
    return [*names]


def _on_hidden(make: Callable[[list[nn.Parameter]], Optimizer]) -> Make:
    """An optimizer on the hidden matrices, AdamW on all other parameters."""

    def make_both(model: nn.Module, size: Size) -> Optimizer:
        groups = {group["role"]: group["params"] for group in groups_by_role(model)}
        hidden = groups.pop("hidden")
        rest = [p for params in groups.values() for p in params]
        return OptimizerPerRole([make(hidden), AdamW(rest, lr=1e-3)])

    return make_both


def _adamw_8bit(model: nn.Module, size: Size) -> Optimizer:
    optimizer: Optimizer = import_module("torchao.optim").AdamW8bit(model.parameters(), lr=1e-3)
    return optimizer


def _low_rank(model: nn.Module, size: Size) -> Optimizer:
    to_low_rank_(model, rank=size.low_rank)
    return AdamW(model.parameters(), lr=1e-3)


OPTIMIZERS: Mapping[str, Make] = {
    "AdamW": lambda model, size: AdamW(model.parameters(), lr=1e-3),
    "Muon": _on_hidden(lambda params: Muon(params, lr=1e-2)),
    "SOAP": _on_hidden(lambda params: SOAP(params, lr=1e-3)),
    "AdamW8bit": _adamw_8bit,
    "GaLore": lambda model, size: GaLore(groups_by_role(model), rank=size.galore_rank),
    "Fira": lambda model, size: Fira(groups_by_role(model), rank=size.galore_rank),
    "APOLLO": lambda model, size: APOLLO(groups_by_role(model), rank=size.apollo_rank),
    "APOLLO-Mini": lambda model, size: APOLLO(
        groups_by_role(model), rank=1, scale=128, scale_type="tensor"
    ),
    "SCALE": lambda model, size: SCALE(groups_by_role(model), lr=1e-3),
    "ClippedSGD": lambda model, size: ClippedSGD(groups_by_role(model)),
    "LoRAPre": lambda model, size: LoRAPre(groups_by_role(model), rank=size.lora_pre_rank),
    "low rank": _low_rank,
}
"""The optimizers by name; each makes one for a model, which ``low rank`` changes."""
