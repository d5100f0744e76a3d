"""How an EMA direction is stored in less than float32.

Both formats round stochastically. A step changes a direction by a small part of its size, about
``1 - ema_decay``. Rounding to nearest loses what is below half a unit of the format, and the
direction stops where it is: at ``ema_decay=0.999``, after 3,000 steps with as much drift, slowly
changing, as noise, it was off by 26 % in bfloat16 and 83 % in int8; with stochastic rounding by 4 %
and 10 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = [
    "BLOCK_SIZE",
    "DIRECTION_DTYPES",
    "BFloat16",
    "Codec",
    "Int8",
    "Wide",
    "codec_for",
    "read_any",
]

DIRECTION_DTYPES = ("float32", "bfloat16", "int8")
"""What ``direction_dtype`` may be."""

BLOCK_SIZE = 128
"""Elements along the last dimension that share one scale in int8."""

_MIN_ELEMENTS = 4096


class Codec(Protocol):
    """A format: tensors that store one direction."""

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Those of the stored tensors."""

    def make(self, p: Tensor) -> list[Tensor]:
        """Return the tensors that store zero for a parameter, placed like it."""

    def read(self, stored: Sequence[Tensor]) -> Tensor:
        """Return the direction in float32, in new memory or not."""

    def write_(self, stored: Sequence[Tensor], direction: Tensor, noise: Tensor | None) -> None:
        """Store a direction.

        Args:
            stored: Overwritten.
            direction: Of the parameter's shape.
            noise: Uniform in [0, 1), of the same shape. ``None``: round to nearest.
        """


class Wide:
    """One tensor in float32, or the parameter's dtype where that is wider."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtypes = (dtype,)

    def make(self, p: Tensor) -> list[Tensor]:
        """Return one tensor of the parameter's shape."""
        return [torch.zeros_like(p, dtype=self.dtypes[0], requires_grad=False)]

    def read(self, stored: Sequence[Tensor]) -> Tensor:
        """Return the tensor itself."""
        return stored[0]

    def write_(self, stored: Sequence[Tensor], direction: Tensor, noise: Tensor | None) -> None:
        """Copy."""
        stored[0].copy_(direction)


class BFloat16:
    """One tensor in bfloat16.

    Example:
        >>> stored = [torch.zeros(4, dtype=torch.bfloat16)]
        >>> noise = torch.tensor([0.0, 0.25, 0.5, 0.75])
        >>> BFloat16().write_(stored, torch.full((4,), 1.0 + 2**-8), noise)  # half a unit
        >>> BFloat16().read(stored)
        tensor([1.0000, 1.0000, 1.0078, 1.0078])
    """

    dtypes = (torch.bfloat16,)

    def make(self, p: Tensor) -> list[Tensor]:
        """Return one tensor of the parameter's shape."""
        return [torch.zeros_like(p, dtype=torch.bfloat16, requires_grad=False)]

    def read(self, stored: Sequence[Tensor]) -> Tensor:
        """Return the direction in float32."""
        return stored[0].float()

    def write_(self, stored: Sequence[Tensor], direction: Tensor, noise: Tensor | None) -> None:
        """Round away from zero with the probability of what is cut off."""
        if noise is None:
            stored[0].copy_(direction)
            return
        bits = direction.float().view(torch.int32)  # bfloat16 is the upper half of float32
        bits = (noise * 2**16).int().add_(bits).bitwise_and_(-(2**16))
        stored[0].copy_(bits.view(torch.float32))


class Int8:
    """Codes in int8, and a float32 scale for each block of :data:`BLOCK_SIZE` in a row.

    Codes have the parameter's shape and scales its shape with the last dimension in blocks, so that
    shards of rows of one are shards of rows of the other.

    Example:
        >>> stored = [torch.zeros(1, 2, dtype=torch.int8), torch.zeros(1, 1)]
        >>> Int8().write_(stored, torch.tensor([[2.54, 0.51]]), torch.tensor([[0.5, 0.2]]))
        >>> stored[0].tolist(), round(stored[1].item(), 6)  # 0.51 is 25.5 units of 0.02
        ([[127, 25]], 0.02)
    """

    # torchao's OptimState8bit rounds to nearest, and cuts blocks across rows.
    dtypes = (torch.int8, torch.float32)

    def make(self, p: Tensor) -> list[Tensor]:
        """Return codes and scales."""
        codes = torch.zeros_like(
            p, dtype=torch.int8, requires_grad=False, memory_format=torch.contiguous_format
        )
        if not isinstance(p, DTensor):
            return [codes, _zero_scales(p)]
        num_blocks = -(-p.shape[-1] // BLOCK_SIZE)
        shape = torch.Size((*p.shape[:-1], num_blocks))
        scales = DTensor.from_local(
            _zero_scales(p.to_local()),
            p.device_mesh,
            p.placements,
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )
        return [codes, scales]

    def read(self, stored: Sequence[Tensor]) -> Tensor:
        """Return the direction in float32."""
        codes, scales = stored
        if codes.shape[-1] % BLOCK_SIZE == 0:
            blocks = _in_blocks(codes).mul(scales.unsqueeze(-1))
            return blocks.flatten(-2)
        return codes * scales.repeat_interleave(BLOCK_SIZE, dim=-1)[..., : codes.shape[-1]]

    def write_(self, stored: Sequence[Tensor], direction: Tensor, noise: Tensor | None) -> None:
        """Round up with the probability of what is cut off."""
        codes, scales = stored
        if codes.numel() == 0:
            return
        last = codes.shape[-1]
        padded = torch.nn.functional.pad(direction.float(), (0, -last % BLOCK_SIZE))
        blocks = _in_blocks(padded)
        scales.copy_(blocks.abs().amax(dim=-1).div_(127.0))
        units = torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
        scaled = (blocks / units).flatten(-2)[..., :last]
        scaled = scaled.add(0.5 if noise is None else noise).floor_()
        codes.copy_(scaled.clamp_(-127, 127))


def codec_for(p: Tensor, direction_dtype: str) -> Codec:
    """Return the format for the direction of a parameter.

    In int8, a parameter with one dimension, with a last dimension that makes small blocks, with few
    elements, or sharded along its last dimension keeps float32: the scales would cost more, or
    would not be shards of the parameter's.
    """
    wide = torch.promote_types(p.dtype, torch.float32)
    if direction_dtype == "float32" or not p.is_floating_point():
        return Wide(wide)
    if direction_dtype == "bfloat16":
        return BFloat16()
    is_large = p.dim() > 1 and p.numel() >= _MIN_ELEMENTS and p.shape[-1] >= BLOCK_SIZE // 2
    is_cut = isinstance(p, DTensor) and any(
        place.is_shard(p.dim() - 1) or place.is_shard(-1) for place in p.placements
    )
    return Int8() if is_large and not is_cut else Wide(wide)


def read_any(p: Tensor, stored: Sequence[Tensor]) -> Tensor:
    """Return a direction that was loaded in any format.

    Args:
        p: The parameter.
        stored: One tensor of numbers, or codes in any dtype and scales.

    Raises:
        ValueError: If codes are sharded.
    """
    if len(stored) == 1:
        return stored[0]
    if isinstance(p, DTensor):
        raise ValueError(
            "direction_dtype must be 'int8' to continue a sharded checkpoint that was made with it."
        )
    return Int8().read(stored)


def _in_blocks(tensor: Tensor) -> Tensor:
    # Not -1, which an empty shard leaves open.
    return tensor.reshape(*tensor.shape[:-1], tensor.shape[-1] // BLOCK_SIZE, BLOCK_SIZE)


def _zero_scales(p: Tensor) -> Tensor:
    shape = (*p.shape[:-1], -(-p.shape[-1] // BLOCK_SIZE))
    return torch.zeros(shape, dtype=torch.float32, device=p.device)
