"""Weights that differ between processes: their average, and all of them in one checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_ema_nesterov.companions.decentralized.parameters import FlatParameters

__all__ = ["CHECKPOINT_KEY", "Replica", "gather_ranks", "payload_of_rank"]

CHECKPOINT_KEY = "decentralized"
"""Key of what each rank holds in a checkpoint."""


class Replica:
    """One process's weights and float buffers, which can be at the average over processes.

    Args:
        parameters: The trainable parameters.
        module: Its buffers belong to the replica; integer ones stay local.
    """

    def __init__(self, parameters: FlatParameters, module: nn.Module) -> None:
        self._parameters = parameters
        self._module = module
        self._own: tuple[list[Tensor], list[Tensor]] | None = None

    @property
    def is_at_average(self) -> bool:
        """Whether the module holds the average now."""
        return self._own is not None

    @torch.no_grad()
    def move_to_average(self) -> None:
        """Have the module hold the average over all processes, each of which must call this."""
        if self.is_at_average:
            return
        params = self._parameters.tensors
        self._own = [p.detach().clone() for p in params], self._clone_buffers()
        self._parameters.write(_mean(self._parameters.read()))
        for buffer in self._module.buffers():
            if buffer.is_floating_point() and buffer.numel():
                buffer.copy_(_mean(buffer.clone()))

    @torch.no_grad()
    def move_back(self) -> None:
        """Have the module hold the process's own weights and buffers again, bit for bit."""
        if self._own is None:
            return
        params, buffers = self._own
        self._own = None
        for p, own in zip(self._parameters.tensors, params, strict=True):
            p.copy_(own)
        for buffer, own in zip(self._module.buffers(), buffers, strict=True):
            buffer.copy_(own)

    @contextmanager
    def at_average(self) -> Iterator[None]:
        """Hold the average for a while; all processes enter together."""
        was_there = self.is_at_average
        self.move_to_average()
        try:
            yield
        finally:
            if not was_there:
                self.move_back()

    def save(self) -> dict[str, list[Tensor]]:
        """Return copies of the process's own weights and buffers."""
        if self._own is not None:
            params, buffers = self._own
        else:
            params = [p.detach().clone() for p in self._parameters.tensors]
            buffers = self._clone_buffers()
        return {"weights": params, "buffers": buffers}

    @torch.no_grad()
    def load(self, saved: dict[str, list[Tensor]]) -> None:
        """Hold what :meth:`save` returned."""
        self._own = None
        for p, values in zip(self._parameters.tensors, saved["weights"], strict=True):
            p.copy_(values)
        for buffer, values in zip(self._module.buffers(), saved["buffers"], strict=True):
            buffer.copy_(values)

    def _clone_buffers(self) -> list[Tensor]:
        return [b.detach().clone() for b in self._module.buffers()]


def gather_ranks(payload: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Collect what each process has to save, on the process of rank 0; ``None`` on others."""
    gathered: list[Any] | None = None
    if dist.get_rank() == 0:
        gathered = [None] * dist.get_world_size()
    dist.gather_object(_to_cpu(payload), gathered)
    return gathered


def payload_of_rank(checkpoint: dict[str, Any], method: str) -> dict[str, Any] | None:
    """Return this process's part of a checkpoint; ``None`` if it was made without the method.

    Raises:
        MisconfigurationException: If it was made by another method or on another number of
            processes.
    """
    saved = checkpoint.get(CHECKPOINT_KEY)
    if saved is None:
        return None
    if saved["method"] != method:
        raise MisconfigurationException(
            f"The checkpoint must be one of {method}, got one of {saved['method']}, which keeps "
            "other vectors. Load only its state_dict, the average over agents, to start anew."
        )
    ranks, num = saved["ranks"], dist.get_world_size()
    if len(ranks) != num:
        raise MisconfigurationException(
            f"{method} resumes on as many processes as saved the checkpoint: it has weights and "
            f"duals of {len(ranks)}, got {num} processes. The duals of all agents sum to zero, and "
            f"no part of them does. Start {len(ranks)} processes, or load only the checkpoint's "
            "state_dict, the average over agents, to start anew."
        )
    part: dict[str, Any] = ranks[dist.get_rank()]
    return part


def _mean(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)  # gloo has no average
    return tensor.div_(dist.get_world_size())


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_cpu(item) for item in value)
    return value
