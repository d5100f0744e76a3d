"""Evaluation at an average: of what is trained, of what was trained before, of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate

from lightning_ema_nesterov.averages.folder import Folder
from lightning_ema_nesterov.averages.saved import (
    SavedDirections,
    directions_in_file,
    directions_in_folder,
)
from lightning_ema_nesterov.core.lookahead import Lookahead
from lightning_ema_nesterov.core.progress import plain_name
from lightning_ema_nesterov.core.sharding import local

__all__ = ["AtSavedAverage", "Evaluation", "Samples"]

_SAMPLES_PER_TENSOR = 16


class Evaluation:
    """Takes the parameters of a module to the average, and back.

    In training that is the average of the lookaheads that train. Outside of it, that of the
    checkpoint that was given, or else of what was trained last.

    Args:
        share: Share of the way from the iterate to the average, in [0, 1].
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._trained: list[tuple[Lookahead, Samples]] = []
        self._saved: SavedDirections | None = None
        self._at_saved: AtSavedAverage | None = None

    def forget(self, *, also_trained: bool) -> None:
        """Forget the checkpoint, and what was trained."""
        self._saved = None
        if also_trained:
            self._trained = []

    def take_trained(self, lookaheads: Iterable[Lookahead]) -> None:
        """Note the averages of a training that ends, with its parameters at the iterate."""
        self._trained = [(one, Samples(one.rule.store.all_params())) for one in lookaheads]

    def take_checkpoint(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        """Note the average of a checkpoint.

        Args:
            path: Where it is.
            checkpoint: What was loaded of it; the whole unless it is a distributed one.

        Raises:
            ValueError: If it holds no average, one of an earlier step, or its weights are not the
                iterate.
        """
        if Folder.is_at(path):
            saved = directions_in_folder(Folder(path))
        elif "current_model_state" in checkpoint:
            raise ValueError(
                "evaluate_at='average' must go without WeightAveraging of Lightning, whose average "
                f"is what {path} has as its weights. Use evaluate_at='iterate' to evaluate that "
                "one, or write the other with `ema-nesterov average`."
            )
        else:
            saved = directions_in_file(checkpoint)
        saved.check_are_current(checkpoint)
        self._saved = saved

    def enter(self, module: nn.Module, training: Sequence[Lookahead]) -> bool:
        """Move the parameters to the average.

        Args:
            module: What is evaluated.
            training: The lookaheads that train it now; none outside of training.

        Returns:
            Whether there is an average.

        Raises:
            ValueError: As :class:`AtSavedAverage`.
        """
        if self._saved is not None:
            self._at_saved = AtSavedAverage(module, self._saved, self._share)
            return True
        lookaheads = training or self._trained_before(module)
        for lookahead in lookaheads:
            lookahead.rule.store.follow_params()
            lookahead.enter_average(self._share)
        return bool(lookaheads)

    def leave(self, training: Sequence[Lookahead]) -> None:
        """Return to the iterate, bit for bit; nothing where the parameters are there."""
        if self._at_saved is not None:
            self._at_saved.leave()
            self._at_saved = None
        for lookahead in (*training, *(trained for trained, _ in self._trained)):
            lookahead.leave_average()

    @contextmanager
    def at_iterate(self) -> Iterator[None]:
        """Hold the parameters at the iterate inside a ``with`` block, outside of training."""
        with ExitStack() as stack:
            for lookahead, _ in self._trained:
                stack.enter_context(lookahead.at_iterate())
            if self._at_saved is not None:
                stack.enter_context(self._at_saved.at_iterate())
            yield

    def _trained_before(self, module: nn.Module) -> list[Lookahead]:
        for lookahead, _ in self._trained:
            lookahead.sharding.drop_copies()
        # Another average at the end of fit, or weights that were loaded: what was learned about the
        # former ones does not lead to an average of these.
        is_there = all(samples.are_unchanged() for _, samples in self._trained)
        return [
            lookahead
            for lookahead, _ in self._trained
            if is_there and lookahead.rule.store.has_params_of(module)
        ]


class AtSavedAverage:
    """Parameters of a module at the average that a checkpoint holds.

    A copy of what this process holds of the parameters is kept meanwhile.

    Args:
        module: Holds the weights of the checkpoint.
        directions: Those of the checkpoint.
        share: Share of the way from the iterate to the average, in [0, 1].

    Raises:
        ValueError: If FSDP (1) shards the module, or it lacks parameters of the checkpoint.
    """

    @torch.no_grad()
    def __init__(self, module: nn.Module, directions: SavedDirections, share: float) -> None:
        if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
            raise ValueError(
                "evaluate_at='average' must go without FSDP (1) outside of fit, whose flat shards "
                "have no names. Write the average with `ema-nesterov average`, and evaluate that."
            )
        self._module = module
        self._reshard()
        params = {plain_name(name): p for name, p in module.named_parameters()}
        missing = [name for name in directions.names() if name not in params]
        if missing:
            raise ValueError(
                f"The module must have the parameters of the checkpoint, and lacks {len(missing)} "
                f"of {len(directions.names())} (first: {missing[0]!r})."
            )
        self._kept = [(params[n].data, params[n].detach().clone()) for n in directions.names()]
        for name in directions.names():
            p = params[name]
            p.data.add_(_placed_like(p, directions.offset(name)), alpha=-share)

    @torch.no_grad()
    def leave(self) -> None:
        """Return to the weights of the checkpoint, bit for bit."""
        self._reshard()
        for p, kept in self._kept:
            p.copy_(kept)

    @contextmanager
    def at_iterate(self) -> Iterator[None]:
        """Hold the parameters at the iterate inside a ``with`` block."""
        self._reshard()
        averages = [p.clone() for p, _ in self._kept]
        self.leave()
        try:
            yield
        finally:
            self._reshard()
            for (p, _), average in zip(self._kept, averages, strict=True):
                p.copy_(average)

    def _reshard(self) -> None:
        # FSDP2 keeps the root gathered after a forward pass: the next would run where it was.
        for part in self._module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def _placed_like(p: Tensor, whole: Tensor) -> Tensor:
    whole = whole.to(p.device)
    if not isinstance(p, DTensor):
        return whole
    # Every process has the whole, and takes its shard of it: nothing is communicated.
    copies = [Replicate()] * p.device_mesh.ndim
    made = DTensor.from_local(whole, p.device_mesh, copies, run_check=False)
    return made.redistribute(placements=p.placements)


class Samples:
    """A few elements of each parameter, to tell later whether somebody changed parameters.

    A step, an average of the weights or a checkpoint that is loaded changes nearly all of them.

    Args:
        params: The parameters.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._kept = [(p, _sample(p)) for p in params]

    def are_unchanged(self) -> bool:
        """Return whether the parameters hold what they held."""
        return all(torch.equal(_sample(p), kept) for p, kept in self._kept)


def _sample(p: Tensor) -> Tensor:
    [own] = local([p.detach()])
    flat = own.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES_PER_TENSOR)].to("cpu", copy=True)
