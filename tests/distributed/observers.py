"""Callbacks and contexts that note what the method does beside the result of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, strategies
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.profiler import ProfilerActivity, profile
from typing_extensions import override

from lightning_ema_nesterov.core.sharding import Sharding, local
from lightning_ema_nesterov.rules import ema_joined
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from lightning_ema_nesterov.trainer.base_callback import LookaheadCallback
from tests.distributed.strategies import full_state_dict_context, replaced


@contextmanager
def counted_collectives(counts: dict[str, int], *, is_on: bool) -> Iterator[None]:
    """Add up the collectives of everything inside, those that C++ starts too, by their name."""
    if not is_on:
        yield
        return
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        yield
    for event in profiler.key_averages():
        if event.key.startswith("c10d::"):
            counts[event.key] = event.count


class CountsMoves(Callback):
    """Counts the collectives of each move between iterate and lookahead point."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        [callback] = [c for c in callbacks_of(trainer) if isinstance(c, LookaheadCallback)]
        for lookahead in callback.lookaheads:
            for name in ("extrapolate", "pause", "resume", "retract"):
                setattr(lookahead, name, self._counted(getattr(lookahead, name)))

    def _counted(self, move: Callable[[], None]) -> Callable[[], None]:
        def counted() -> None:
            with CommDebugMode() as mode:  # type: ignore[no-untyped-call]  # torch has no types here
                move()
            self.counts.append(mode.get_total_counts())

        return counted


class KeepsMetrics(Logger):
    """Keeps what is logged at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[dict[str, float]] = []

    @property
    @override
    def name(self) -> str:
        return "kept"

    @property
    @override
    def version(self) -> int:
        return 0

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        own = {key: value for key, value in metrics.items() if key.startswith("ema_nesterov/")}
        if own:
            self.metrics.append(own)

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """There are none."""


class RecordsSteps(Callback):
    """What this process holds: x and m after every batch, and y before every step."""

    def __init__(self) -> None:
        self.after: list[tuple[Tensor, Tensor]] = []
        self.before: list[Tensor] = []

    @override
    def on_before_optimizer_step(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.before.append(self._params(trainer))

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        optimizer = trainer.optimizers[0]
        Sharding(trainer.strategy.model, optimizer).drop_copies()
        # FSDP (1) gives a parameter no gradient where a process holds none of it.
        directions = [
            optimizer.state.get(p, {}).get(DIRECTION_KEY, torch.zeros_like(p))
            for p in optimizer.param_groups[0]["params"]
        ]
        flat = torch.cat([m.detach().flatten().cpu() for m in local(directions)])
        self.after.append((self._params(trainer), flat))

    def _params(self, trainer: Trainer) -> Tensor:
        params = local(trainer.optimizers[0].param_groups[0]["params"])
        return torch.cat([p.detach().flatten().cpu() for p in params])


def check_step(
    y: Tensor,
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    *,
    is_skipped: bool,
    atol: float = 2e-7,
) -> None:
    """Check one step of :class:`RecordsSteps` against the equations.

    Args:
        y: The lookahead point.
        before: Iterate and direction before the step.
        after: Those after it.
        is_skipped: Whether GradScaler skipped it.
        atol: Rounding of a parameter near 1, in directions near 1e-3; by default in float32.
    """
    (x, m), (x_next, m_next) = [(x.double(), m.double()) for x, m in (before, after)]
    torch.testing.assert_close(y.double(), x + 0.5 * m, rtol=0, atol=atol)
    if is_skipped:
        torch.testing.assert_close(x_next, x, rtol=0, atol=atol)
        torch.testing.assert_close(m_next, m, rtol=0, atol=0)
        return
    torch.testing.assert_close(m_next, 0.9 * m + 0.1 * (x_next - x), rtol=0, atol=atol)
    assert (x_next - x).abs().max() > 1e-3
    assert (m_next - m).abs().max() > 1e-4


class SavesInPlace(Callback):
    """Saves as Lightning does without the method: into the folder of the former checkpoint."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del vars(trainer.strategy)["save_checkpoint"]


class SavesWholeFile(Callback):
    """Chooses FSDP1's full state dict after the check that refuses it on a CPU.

    It crashes there where torch offloads it; without that, the code is the same.
    """

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for owner, name, value in (
            (trainer.strategy, "_state_dict_type", "full"),
            (strategies.fsdp, "_get_full_state_dict_context", full_state_dict_context),
        ):
            assert hasattr(owner, name)
            setattr(owner, name, value)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = vars(trainer)["callbacks"]
    return callbacks


@contextmanager
def counted_kernel_calls(calls: list[int]) -> Iterator[None]:
    """Note the sizes that the compiled kernel worked on, of calls that came back."""
    compiled = vars(ema_joined)["_compiled"]

    def counted(*tensors: Tensor) -> None:
        compiled(*tensors)
        calls.append(tensors[0].numel())

    with replaced(ema_joined, "_compiled", counted):
        yield
