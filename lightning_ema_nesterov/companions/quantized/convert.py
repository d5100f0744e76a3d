"""Put quantizers and rotations into a model, in place."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from lightning_ema_nesterov.companions.quantized.choose import (
    Choice,
    Rotations,
    choose_rotations,
)
from lightning_ema_nesterov.companions.quantized.layers import RotatedLinear
from lightning_ema_nesterov.companions.quantized.plan import Plan, Rules
from lightning_ema_nesterov.companions.quantized.quantizers import Bits

__all__ = ["rotate_and_quantize"]


def rotate_and_quantize(
    model: nn.Module,
    calibration_batches: Iterable[Any],
    *,
    weight_bits: int | None = 4,
    activation_bits: int | None = 4,
    kv_bits: int | None = 4,
    rotations: Rotations = "adaptive",
    skip: Sequence[str] = (),
    unrotated: Sequence[str] = (),
    seed: int = 0,
    run: Callable[[nn.Module, Any], Any] | None = None,
) -> list[Choice]:
    r"""Put fake quantizers into a model, and rotations where they lower the rounding error.

    Each ``nn.Linear`` becomes :math:`y = Q_x(x R)\, Q_w(W R)^T + b`. In each LitGPT model with
    blocks of the LLaMA kind, norms are folded into the next weights, the residual stream is
    rotated and the rotation merged (R1), and rotations of values (R2), of queries and keys (R3)
    and of the input of the last layer of an MLP (R4) stay in the forward pass; keys and values are
    rounded, embedding and head are not. Parameters keep their names, and stay in full precision.

    Args:
        model: Changed in place, before an optimizer is made. With pre-trained weights: the choice
            is made here and not again.
        calibration_batches: What the forward pass takes. A few of the training data.
        weight_bits: 2 to 8, one scale per output channel. ``None``: no rounding.
        activation_bits: Of each quantized layer's input, 2 to 8, one scale per token.
        kv_bits: Of keys and values in LitGPT models, 2 to 8, one scale per token and head.
        rotations: ``"adaptive"``: each where it lowers the error; ``"all"``; ``"none"``.
        skip: Layers left in full precision, names or patterns such as ``"*.proj"``.
        unrotated: Places that are never rotated, likewise. ``"residual"`` is R1.
        seed: Of the random signs of rotations.
        run: Called as ``run(model, batch)``; ``None``: ``model(batch)``.

    Returns:
        What was chosen for each place, and why.

    Raises:
        ModuleNotFoundError: If torchao is missing.
        RuntimeError: If a layer that would be quantized is not called by the batches.
        ValueError: If an argument is out of its range, a layer cannot be rotated, embeddings are
            tied, the model has no layer that can be quantized, or has been converted before.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> choices = rotate_and_quantize(model, [torch.randn(4, 8)], weight_bits=None,
        ...     activation_bits=None, rotations="all")
        >>> [(choice.name, choice.is_rotated) for choice in choices]
        [('0', True), ('2', True)]

    References:
        Wei, Yau, Wai, Zhao, Kang, Park, Hong, *RoSTE: An efficient quantization-aware supervised
        fine-tuning approach for large language models*, ICML 2025.
        https://arxiv.org/abs/2502.09003
    """
    if rotations not in ("adaptive", "all", "none"):
        raise ValueError(f"rotations must be 'adaptive', 'all' or 'none', got {rotations!r}.")
    bits = Bits(weight_bits, activation_bits, kv_bits)
    rules = Rules(bits, rotations, tuple(skip), tuple(unrotated), seed)
    plan = make_plan(model, rules)
    for change in plan.changes:
        change()
    run = run or (lambda model, batch: model(batch))
    choices = choose_rotations(model, plan.sites, calibration_batches, run, rotations)
    for merge in plan.merges:
        merge()
    return choices


def make_plan(model: nn.Module, rules: Rules) -> Plan:
    """Return what will be done, or raise for what cannot be."""
    if any(isinstance(module, RotatedLinear) for module in model.modules()):
        raise ValueError("model must not have been rotated and quantized before.")
    plan = Plan()
    inside: set[nn.Module] = set()
    for name, gpt in _gpts_of(model):
        llama = importlib.import_module("lightning_ema_nesterov.companions.quantized.llama")
        llama.plan_gpt(plan, rules, name, gpt)
        inside.update(gpt.modules())
    for name, layer in model.named_modules():
        # Subclasses may do something else with their weight.
        if type(layer) is nn.Linear and layer not in inside and not rules.is_skipped(name):
            _plan_linear(plan, rules, model, name, layer)
    rules.check_names()
    if not plan.sites:
        raise ValueError(
            "model must have nn.Linear layers to quantize, got none. In a LightningModule, make "
            "them in __init__."
        )
    return plan


def _plan_linear(plan: Plan, rules: Rules, model: nn.Module, name: str, layer: nn.Linear) -> None:
    if not name:
        raise ValueError("model must contain its nn.Linear, got a single one: wrap it.")
    site, rotation = rules.site(name, "input", layer.in_features)
    rotated = RotatedLinear(layer, rules.bits, site.switch, rotation)
    plan.sites.append(site)
    plan.changes.append(lambda: model.set_submodule(name, rotated))


def _gpts_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the LitGPT models in a model, without an import of LitGPT where there can be none."""
    litgpt = sys.modules.get("litgpt.model")
    if litgpt is None:
        return []
    return [(name, m) for name, m in model.named_modules() if isinstance(m, litgpt.GPT)]
