"""Fake quantizers of torchao, asymmetric, with one scale per token or per output channel."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from typing_extensions import override

__all__ = ["Bits", "FakeQuantizer", "make_quantizer"]


@dataclass(frozen=True)
class Bits:
    """How many bits numbers have; ``None`` leaves them as they are.

    Attributes:
        weights: Of a linear layer, 2 to 8; one scale per output channel.
        activations: Input of a linear layer, 2 to 8; one scale per token.
        keys_values: Keys and values of attention, 2 to 8; one scale per token and head.

    Raises:
        ValueError: If a number is out of its range.
    """

    weights: int | None
    activations: int | None
    keys_values: int | None

    def __post_init__(self) -> None:
        for argument, bits in (
            ("weight_bits", self.weights),
            ("activation_bits", self.activations),
            ("kv_bits", self.keys_values),
        ):
            if bits is not None and not 2 <= bits <= 8:
                raise ValueError(f"{argument} must be in 2 to 8, or None, got {bits}.")


class FakeQuantizer(nn.Module):
    r"""Round each row to a grid of :math:`2^b` values; the gradient is that of the identity.

    The last dimension is a row: a token's activations, or the weights of an output channel. Its
    grid is asymmetric, spans all of its numbers and 0, and contains 0 exactly:

    .. math:: s = (\max(x, 0) - \min(x, 0)) / (2^b - 1), \quad
        Q(x) = s\, (\operatorname{clamp}(\lfloor x / s \rceil + z, 0, 2^b - 1) - z)

    with the zero point :math:`z = \lfloor -\min(x, 0) / s \rceil`. Computed in float32 by torchao.

    Args:
        bits: 2 to 8.

    Raises:
        ModuleNotFoundError: If torchao is missing.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        qat = _import_torchao()
        # For weights too: with "per_channel", torchao 0.18 turns asymmetric zero points, which it
        # computes as floats, into the integer 0, and clips every row that is not centered.
        config = qat.IntxFakeQuantizeConfig(
            getattr(torch, f"int{bits}"), "per_token", is_symmetric=False
        )
        self.quantizer = qat.IntxFakeQuantizer(config)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded, of its shape and dtype."""
        with torch.no_grad():
            rounded = self.quantizer(x.float()).to(x.dtype)
        output: Tensor = _StraightThrough.apply(x, rounded)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return output


class _StraightThrough(torch.autograd.Function):
    # torchao's own gradient is 0 where a number is clamped; RoSTE's is not.
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0], None


def make_quantizer(bits: int | None) -> nn.Module:
    """Return a quantizer of so many bits, or the identity for ``None``."""
    return nn.Identity() if bits is None else FakeQuantizer(bits)


def _import_torchao() -> Any:
    try:
        return importlib.import_module("torchao.quantization.qat")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "RotatedQAT needs torchao for its fake quantizers: "
            "pip install 'lightning-ema-nesterov[quantized]'"
        ) from error
