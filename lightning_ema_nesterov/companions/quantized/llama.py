"""LitGPT models with blocks of the LLaMA kind: what is folded, rotated and rounded where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from litgpt.model import GPT, CausalSelfAttention, LLaMAMLP, RMSNorm
from torch import Tensor, nn
from typing_extensions import override

from lightning_ema_nesterov.companions.quantized.hadamard import Rotation
from lightning_ema_nesterov.companions.quantized.layers import (
    HeadQuantizer,
    RotatedLinear,
    Switch,
)
from lightning_ema_nesterov.companions.quantized.plan import Plan, Rules
from lightning_ema_nesterov.companions.quantized.quantizers import Bits

__all__ = ["RotatedAttention", "UnitRMSNorm", "plan_gpt"]

_EXACT = Bits(None, None, None)


class UnitRMSNorm(nn.Module):
    """Divide by the root of the mean square, in float32 or wider; a gain is in the next weights.

    Without a gain it commutes with a rotation.

    Args:
        eps: Added to the mean square.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` of unit root mean square along the last dimension."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (wide.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)


class RotatedAttention(CausalSelfAttention):  # type: ignore[misc]  # LitGPT is not typed
    """LitGPT's attention with rounded keys and values; an attention becomes one in place."""

    heads: HeadQuantizer

    @override
    def scaled_dot_product_attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Attend with rotated and rounded keys and values."""
        output: Tensor = super().scaled_dot_product_attention(*self.heads(q, k, v), mask)
        return output


def plan_gpt(plan: Plan, rules: Rules, name: str, gpt: GPT) -> None:
    """Add to a plan what will be done to a LitGPT model.

    Raises:
        ValueError: If embeddings are tied, a block is not of the LLaMA kind, or something cannot be
            rotated.
    """
    prefix = f"{name}." if name else ""
    _check_gpt(prefix, gpt)
    size = gpt.config.n_embd
    residual, rotation = rules.site(f"{prefix}residual", "R1", size)
    plan.sites.append(residual)
    plan.changes.append(lambda: _fold_norms(gpt))
    readers: list[RotatedLinear] = []
    for idx, block in enumerate(gpt.transformer.h):
        block_name = f"{prefix}transformer.h.{idx}"
        for part, parent in (("attn", block.attn), ("mlp", block.mlp)):
            for layer_name in ("qkv",) if part == "attn" else ("fc_1", "fc_2"):
                bits = _bits(rules, f"{block_name}.{part}.{layer_name}")
                layer = getattr(parent, layer_name)
                reader = RotatedLinear(layer, bits, residual.switch, rotation)
                readers.append(reader)
                plan.changes.append(_setter(parent, layer_name, reader))
        _plan_attention(plan, rules, f"{block_name}.attn", block.attn)
        _plan_down(plan, rules, f"{block_name}.mlp.proj", block.mlp)
    plan.merges.append(lambda: _merge_residual(gpt, readers, residual.switch, rotation))


def _plan_attention(plan: Plan, rules: Rules, name: str, attn: Any) -> None:
    size = attn.config.head_size
    values, value_rotation = rules.site(f"{name}.proj", "R2", size)
    keys, key_rotation = rules.site(name, "R3", size)
    heads = HeadQuantizer(rules.bits, keys.switch, key_rotation, values.switch, value_rotation)
    # The values of each head arrive rotated: only the weight is rotated, head by head.
    proj = RotatedLinear(
        attn.proj,
        _bits(rules, f"{name}.proj"),
        values.switch,
        value_rotation,
        rotates_input=False,
    )

    def change() -> None:
        attn.__class__ = RotatedAttention
        attn.heads = heads
        attn.proj = proj

    plan.sites += [values, keys]
    plan.changes.append(change)


def _plan_down(plan: Plan, rules: Rules, name: str, mlp: LLaMAMLP) -> None:
    down, rotation = rules.site(name, "R4", mlp.proj.in_features)
    plan.sites.append(down)
    layer = RotatedLinear(mlp.proj, _bits(rules, name), down.switch, rotation)
    plan.changes.append(_setter(mlp, "proj", layer))


def _bits(rules: Rules, name: str) -> Bits:
    return _EXACT if rules.is_skipped(name) else rules.bits


def _setter(parent: nn.Module, name: str, layer: nn.Module) -> Callable[[], None]:
    return lambda: setattr(parent, name, layer)


def _check_gpt(prefix: str, gpt: GPT) -> None:
    if gpt.lm_head.weight is gpt.transformer.wte.weight:
        raise ValueError(
            f"{prefix}lm_head and {prefix}transformer.wte must not be tied, got one weight: the "
            "last norm is folded into the head alone. Untie them: "
            "gpt.lm_head.weight = nn.Parameter(gpt.lm_head.weight.detach().clone())."
        )
    for idx, block in enumerate(gpt.transformer.h):
        problem = _problem(block)
        if problem:
            raise ValueError(
                f"{prefix}transformer.h.{idx} must be a block of the LLaMA kind, got {problem}."
            )
    if type(gpt.transformer.ln_f) is not RMSNorm:
        raise ValueError(
            f"{prefix}transformer.ln_f must be LitGPT's RMSNorm, got "
            f"{type(gpt.transformer.ln_f).__name__}."
        )


def _problem(block: Any) -> str:
    """Return what keeps a block from being folded and rotated, ``""`` if nothing does."""
    if type(block.attn) is not CausalSelfAttention:
        return f"{type(block.attn).__name__} for attention"
    if not isinstance(block.mlp, LLaMAMLP):
        return f"{type(block.mlp).__name__} for its MLP"
    norms = [block.norm_1] + ([] if block.norm_2 is None else [block.norm_2])
    for norm in norms:
        if type(norm) is not RMSNorm:
            return f"the norm {type(norm).__name__}"
    if not all(
        isinstance(n, nn.Identity) for n in (block.post_attention_norm, block.post_mlp_norm)
    ):
        return "norms after attention or MLP"
    layers = (block.attn.qkv, block.attn.proj, block.mlp.fc_1, block.mlp.fc_2, block.mlp.proj)
    others = [type(layer).__name__ for layer in layers if type(layer) is not nn.Linear]
    return f"the layer {others[0]}" if others else ""


@torch.no_grad()
def _fold_norms(gpt: GPT) -> None:
    """Multiply each norm's gain into the weights that read its output, in float64."""
    for block in gpt.transformer.h:
        mlp_layers = [block.mlp.fc_1, block.mlp.fc_2]
        shares = block.norm_2 is None
        _fold(block.norm_1, [block.attn.qkv, *(mlp_layers if shares else [])])
        block.norm_1 = UnitRMSNorm(block.norm_1.eps)
        if not shares:
            _fold(block.norm_2, mlp_layers)
            block.norm_2 = UnitRMSNorm(block.norm_2.eps)
    _fold(gpt.transformer.ln_f, [gpt.lm_head])
    gpt.transformer.ln_f = UnitRMSNorm(gpt.transformer.ln_f.eps)


def _fold(norm: RMSNorm, layers: list[nn.Linear]) -> None:
    gain = norm.weight.double() + (1.0 if norm.add_unit_offset else 0.0)
    for layer in layers:
        layer.weight.copy_(layer.weight.double() * gain)


@torch.no_grad()
def _merge_residual(
    gpt: GPT, readers: list[RotatedLinear], switch: Switch, rotation: Rotation | None
) -> None:
    r"""Rotate what is written to and read from the residual stream, in float64, if R1 is on.

    With :math:`h' = h R`: embeddings become :math:`E R`, written outputs :math:`R^T W` and
    :math:`b R`, and weights that read :math:`W R`.
    """
    if rotation is not None and switch.is_on:
        written = [block.attn.proj for block in gpt.transformer.h]
        written += [block.mlp.proj for block in gpt.transformer.h]
        for weight in (
            gpt.transformer.wte.weight,
            gpt.lm_head.weight,
            *(r.weight for r in readers),
        ):
            weight.copy_(rotation(weight.double()))
        for layer in written:
            layer.weight.copy_(rotation(layer.weight.double().T).T)
            if layer.bias is not None:
                layer.bias.copy_(rotation(layer.bias.double()))
    for reader in readers:
        reader.rotation, reader.switch = None, Switch()
