"""Layers with fake quantizers, and a rotation that is on or off."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from typing_extensions import override

from lightning_ema_nesterov.companions.quantized.hadamard import Rotation
from lightning_ema_nesterov.companions.quantized.quantizers import Bits, make_quantizer

__all__ = ["HeadQuantizer", "RotatedLinear", "Switch", "rounding_error"]


class Switch(nn.Module):
    """Whether a rotation is on; in the state dict, so that a checkpoint restores the choice.

    A switch of its own lets several layers share one choice, and collects the rounding errors that
    decide it: ``errors`` is ``None`` unless the network is being calibrated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_on = False
        self.errors: dict[str, list[float]] | None = None

    def add_error(self, part: str, exact: Tensor, rounded: Tensor) -> None:
        """Collect the rounding error of one part, while calibrating."""
        if self.errors is not None:
            self.errors.setdefault(part, []).append(rounding_error(exact, rounded))

    @override
    def get_extra_state(self) -> Tensor:
        """Return whether it is on."""
        return torch.tensor(self.is_on)

    @override
    def set_extra_state(self, state: Tensor) -> None:
        """Turn it on or off as it was saved."""
        self.is_on = bool(state)


class RotatedLinear(nn.Linear):
    r"""A linear layer with fake quantizers: :math:`y = Q_x(x R)\, Q_w(W R)^T + b`.

    Without rounding the rotation cancels. The weight is kept as it was, in full precision, and
    rotated in each forward pass; gradients pass the quantizers as if they were the identity.

    Args:
        layer: Its weight and bias are taken over, not copied.
        bits: Of weight and input.
        switch: Whether :math:`R` is a rotation or the identity.
        rotation: The rotation, of blocks of the input. ``None``: there is none.
        rotates_input: ``False`` where the input arrives rotated.
    """

    def __init__(
        self,
        layer: nn.Linear,
        bits: Bits,
        switch: Switch,
        rotation: Rotation | None,
        *,
        rotates_input: bool = True,
    ) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = layer.weight
        self.bias = layer.bias
        self.switch = switch
        self.rotation = rotation
        self.rotates_input = rotates_input
        self.weight_quantizer = make_quantizer(bits.weights)
        self.input_quantizer = make_quantizer(bits.activations)
        self.train(layer.training)

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Return the output of rounded input and rounded weight."""
        weight: Tensor = self.weight
        if self.rotation is not None and self.switch.is_on:
            weight = self.rotation(weight)
            input = self.rotation(input) if self.rotates_input else input
        rounded_weight, rounded_input = self.weight_quantizer(weight), self.input_quantizer(input)
        self.switch.add_error("weight", weight, rounded_weight)
        self.switch.add_error("input", input, rounded_input)
        return linear(rounded_input, rounded_weight, self.bias)


class HeadQuantizer(nn.Module):
    """Rounds keys and values of attention, with rotations R3 and R2 where they are on.

    Args:
        bits: Of keys and values.
        key_switch: R3: queries and keys are rotated alike, so that their products stay.
        key_rotation: Of a head's size. ``None``: there is none.
        value_switch: R2: values are rotated; the weight of the next layer undoes it.
        value_rotation: Of a head's size, the one of that weight. ``None``: there is none.
    """

    def __init__(
        self,
        bits: Bits,
        key_switch: Switch,
        key_rotation: Rotation | None,
        value_switch: Switch,
        value_rotation: Rotation | None,
    ) -> None:
        super().__init__()
        self.key_switch = key_switch
        self.key_rotation = key_rotation
        self.value_switch = value_switch
        self.value_rotation = value_rotation
        self.key_quantizer = make_quantizer(bits.keys_values)
        self.value_quantizer = make_quantizer(bits.keys_values)

    @override
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, rounded keys and rounded values.

        Args:
            q: Queries after the rotary embedding, the last dimension a head's.
            k: Keys, likewise.
            v: Values, likewise.
        """
        if self.key_rotation is not None and self.key_switch.is_on:
            q, k = self.key_rotation(q), self.key_rotation(k)
        if self.value_rotation is not None and self.value_switch.is_on:
            v = self.value_rotation(v)
        rounded_k, rounded_v = self.key_quantizer(k), self.value_quantizer(v)
        self.key_switch.add_error("keys", k, rounded_k)
        self.value_switch.add_error("values", v, rounded_v)
        return q, rounded_k, rounded_v


def rounding_error(exact: Tensor, rounded: Tensor) -> float:
    """Return the mean square of what rounding changed."""
    return float((rounded.detach().double() - exact.detach().double()).square().mean())
