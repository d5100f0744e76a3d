"""Put quantizers and rotations into a model, in place."""

from __future__ import annotations

import importlib
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from lightning_ema_nesterov.companions.quantized.choose import (
    Choice,
    Rotations,
    Site,
    choose_rotations,
)
from lightning_ema_nesterov.companions.quantized.hadamard import Rotation, hadamard_factors
from lightning_ema_nesterov.companions.quantized.layers import RotatedLinear, Switch
from lightning_ema_nesterov.companions.quantized.quantizers import Bits

__all__ = ["Plan", "Rules", "rotate_and_quantize"]


@dataclass(frozen=True)
class Rules:
    """What a user asked for, and which of the names given were met.

    Attributes:
        bits: Of the quantized layers.
        rotations: How rotations are chosen.
        skip: Patterns of layers that are not quantized.
        unrotated: Patterns of places that are not rotated.
        seed: Of the signs of rotations.
    """

    bits: Bits
    rotations: Rotations
    skip: Sequence[str]
    unrotated: Sequence[str]
    seed: int
    met: set[str] = field(default_factory=set)

    def is_skipped(self, name: str) -> bool:
        """Return whether a layer is left in full precision."""
        return self._matches(name, self.skip)

    def site(self, name: str, kind: str, size: int) -> tuple[Site, Rotation | None]:
        """Return a place for a rotation of a size, and the rotation.

        Raises:
            ValueError: If it must be rotatable and there is no rotation of this size.
        """
        if self._matches(name, self.unrotated):
            return Site(name, kind, Switch(), "in unrotated"), None
        try:
            hadamard_factors(size)
        except ValueError:
            if self.rotations == "none":
                return Site(name, kind, Switch(), "rotations='none'"), None
            raise ValueError(
                f"{name} cannot be rotated ({kind}): no Hadamard matrix of the size {size} of its "
                f"input is known here. Pass unrotated=[{name!r}]."
            ) from None
        # Another seed for each name: signs do not depend on what else is rotated.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {kind} {name}".encode()))
        signs = 2 * torch.randint(2, (size,), generator=generator) - 1
        return Site(name, kind, Switch()), Rotation(size, signs)

    def check_names(self) -> None:
        """Raise if a pattern met nothing."""
        for argument, patterns in (("skip", self.skip), ("unrotated", self.unrotated)):
            for pattern in patterns:
                if pattern not in self.met:
                    raise ValueError(f"{argument} must name layers of the model, got {pattern!r}.")

    def _matches(self, name: str, patterns: Sequence[str]) -> bool:
        met = {pattern for pattern in patterns if fnmatchcase(name, pattern)}
        self.met.update(met)
        return bool(met)


@dataclass
class Plan:
    """What will be done to a model, made before anything is changed.

    Attributes:
        sites: Places where rotations may be.
        changes: Done first, in order.
        merges: Done after the choice, in order.
    """

    sites: list[Site] = field(default_factory=list)
    changes: list[Callable[[], None]] = field(default_factory=list)
    merges: list[Callable[[], None]] = field(default_factory=list)


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
