"""What a user asked for, and what will be done to the model for it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from lightning_ema_nesterov.companions.quantized.choose import Rotations, Site
from lightning_ema_nesterov.companions.quantized.hadamard import Rotation, hadamard_factors
from lightning_ema_nesterov.companions.quantized.layers import Switch
from lightning_ema_nesterov.companions.quantized.quantizers import Bits

__all__ = ["Plan", "Rules"]


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
