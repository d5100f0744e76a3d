"""Which rotations are on: those that lower the rounding error on calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lightning_ema_nesterov.companions.quantized.layers import Switch

__all__ = ["Choice", "Rotations", "Site", "as_table", "choose_rotations", "measure"]

Rotations = Literal["adaptive", "all", "none"]
"""Which layers are rotated: those of the smaller error, all or none."""


@dataclass(frozen=True)
class Site:
    """A place where a rotation may be.

    Attributes:
        name: Of the layer whose error decides.
        kind: ``"R1"`` to ``"R4"`` as QuaRot names them, or ``"input"`` of a plain linear layer.
        switch: Turns it on.
        blocked: Why it cannot be on, ``""`` if it can.
    """

    name: str
    kind: str
    switch: Switch
    blocked: str = ""


@dataclass(frozen=True)
class Choice:
    """What was chosen for one place, and why.

    Attributes:
        name: Of the layer.
        kind: Of the rotation, as in :class:`Site`.
        error: Rounding error without rotation: the sum over weight and activation of the mean
            square of what rounding changes. ``nan`` where it was not measured.
        rotated_error: The same with rotation.
        is_rotated: Whether the rotation is on.
        reason: In words.
    """

    name: str
    kind: str
    error: float
    rotated_error: float
    is_rotated: bool
    reason: str


def choose_rotations(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any],
    rotations: Rotations,
) -> list[Choice]:
    """Turn each rotation on or off, and tell why.

    The network, with its quantizers, sees the batches twice: with all rotations off, and with all
    on. A rotation is on iff its layer's error is smaller in the second.

    Args:
        model: Has the switches; left in the mode it was in.
        sites: Where rotations may be.
        batches: Read once, at least one.
        run: Called as ``run(model, batch)``.
        rotations: ``"adaptive"``; ``"all"`` and ``"none"`` choose without a look at the errors.

    Raises:
        RuntimeError: If a layer was not called.
        ValueError: If there is no batch.
    """
    kept = list(batches)
    if not kept:
        raise ValueError("calibration_batches must hold at least one batch, got none.")
    errors = []
    for is_on in (False, True):
        for site in sites:
            site.switch.is_on = is_on and not site.blocked
        errors.append(measure(model, sites, kept, run))
    choices = [
        _choose(site, off, on, rotations) for site, off, on in zip(sites, *errors, strict=True)
    ]
    for site, choice in zip(sites, choices, strict=True):
        site.switch.is_on = choice.is_rotated
    return choices


@torch.no_grad()
def measure(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Any],
    run: Callable[[nn.Module, Any], Any],
) -> list[float]:
    """Return the rounding error at each place, a mean over batches.

    Raises:
        RuntimeError: If a layer was not called.
    """
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    for site in sites:
        site.switch.errors = {}
    try:
        for batch in batches:
            run(model, batch)
        return [_total(site) for site in sites]
    finally:
        for site in sites:
            site.switch.errors = None
        for module, is_training in was_training.items():
            module.training = is_training


def as_table(choices: Sequence[Choice]) -> str:
    """Return one line for each choice.

    Example:
        >>> print(as_table([Choice("0", "input", 4.0, 1.0, True, "smaller error")]))
        layer  rotation  error    rotated  ratio
        0      input     4        1         0.25  rotated: smaller error
    """
    width = max([5, *(len(choice.name) for choice in choices)])
    lines = [f"{'layer':{width}}  rotation  error    rotated  ratio"]
    for choice in choices:
        ratio = choice.rotated_error / choice.error if choice.error else float("nan")
        verdict = "rotated" if choice.is_rotated else "not rotated"
        lines.append(
            f"{choice.name:{width}}  {choice.kind:8}  {choice.error:<7.3g}  "
            f"{choice.rotated_error:<7.3g}  {ratio:5.2f}  {verdict}: {choice.reason}"
        )
    return "\n".join(lines)


def _choose(site: Site, error: float, rotated_error: float, rotations: Rotations) -> Choice:
    if site.blocked:
        is_rotated, reason = False, site.blocked
    elif rotations != "adaptive":
        is_rotated, reason = rotations == "all", f"rotations={rotations!r}"
    else:
        is_rotated = rotated_error < error
        reason = "smaller error" if is_rotated else "no smaller error"
    return Choice(site.name, site.kind, error, rotated_error, is_rotated, reason)


def _total(site: Site) -> float:
    if not site.switch.errors:
        raise RuntimeError(
            f"{site.name} must be called for each calibration batch, but was not: its quantizers "
            "would do nothing. Pass its name in skip, or batches that reach it."
        )
    return sum(sum(values) / len(values) for values in site.switch.errors.values())
