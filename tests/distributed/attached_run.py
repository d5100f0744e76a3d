"""A run in a loop of one's own, with Fabric or without."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_ema_nesterov import attach_ema_nesterov
from lightning_ema_nesterov.core.sharding import Sharding
from tests.distributed import cases, strategies
from tests.distributed.models import Net, Tokens
from tests.distributed.strategies import rank, world_size
from tests.distributed.trainer_run import full


@dataclass(frozen=True)
class Loop:
    """What is trained, saved and loaded."""

    module: Any
    optimizer: Any
    data: Tokens
    fabric: Fabric | None

    def no_sync(self) -> AbstractContextManager[None]:
        if self.fabric:
            return self.fabric.no_backward_sync(self.module)
        context: AbstractContextManager[None] = getattr(self.module, "no_sync", nullcontext)()
        return context

    def backward(self, loss: Tensor) -> None:
        if self.fabric:
            self.fabric.backward(loss)
        else:
            torch.autograd.backward(loss)

    def save(self, path: Path) -> None:
        if self.fabric:
            self.fabric.save(path, {"model": self.module, "optimizer": self.optimizer})
        else:
            weights, state = get_state_dict(self.module, self.optimizer)
            save({"weights": weights, "state": state}, checkpoint_id=path)

    def load(self, path: Path) -> None:
        if self.fabric:
            self.fabric.load(path, {"model": self.module, "optimizer": self.optimizer})
        else:
            weights, state = get_state_dict(self.module, self.optimizer)
            load({"weights": weights, "state": state}, checkpoint_id=path)
            set_state_dict(
                self.module, self.optimizer, model_state_dict=weights, optim_state_dict=state
            )


def run(case: cases.AttachedRun) -> dict[str, Any]:
    """Train in a loop of one's own; return the weights."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    net = Net(dtype=cases.dtype_of(case.model_dtype), recomputes=case.recomputes)
    loop = make_loop(net, case)
    if case.load_before:
        loop.load(case.load_before)
    called = loop.module
    if case.compile_model:
        called = cast(nn.Module, torch.compile(loop.module, backend="eager"))
    if case.is_attached:
        handle = attach_ema_nesterov(
            loop.optimizer,
            called,
            lookahead_step_size=0.5,
            ema_decay=0.9,
            warmup=1,
            rest=0,
            total_steps=8,
            evaluate_at=case.evaluate_at,
        )
        handle.start_at(case.start)
    if case.load:
        loop.load(case.load)
    iterates: list[dict[str, Tensor]] = []
    losses: list[float] = []

    def note_iterate() -> None:
        if case.notes_evaluations:
            iterates.append(gather(loop, net, case.strategy))

    with strategies.without_reshard(is_on=case.never_reshard):
        losses = train(loop, called, case, note_iterate)
    return {
        "tensors": gather(loop, net, case.strategy),
        "iterates": iterates,
        "losses": losses,
    }


def make_loop(net: Net, case: cases.AttachedRun) -> Loop:
    if case.uses_fabric:
        fabric = strategies.make_fabric(case.strategy)
        module = fabric.setup_module(net)
        optimizer = fabric.setup_optimizers(torch.optim.AdamW(module.parameters(), lr=1e-2))
        data = Tokens(2 * case.accumulate, rank(), world_size())
        return Loop(module, optimizer, data, fabric)
    wrapped, share_idx, num_shares = strategies.wrap(net, case.strategy)
    # A foreach kernel takes the tensors of one mesh only.
    own = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, foreach=False)
    return Loop(wrapped, own, Tokens(2 * case.accumulate, share_idx, num_shares), None)


def train(
    loop: Loop, called: nn.Module, case: cases.AttachedRun, note_iterate: Callable[[], None]
) -> list[float]:
    """Evaluations inside and between accumulation windows, and checkpoints where asked.

    Returns:
        The losses of the evaluations.
    """
    losses = []
    note_iterate()
    for idx in range(case.start * case.accumulate, case.num_steps * case.accumulate):
        batch = loop.data[idx % len(loop.data)]
        is_last = idx % case.accumulate == case.accumulate - 1
        with nullcontext() if is_last else loop.no_sync():
            loop.backward(called(batch) / case.accumulate)
        if case.save_in_window and idx == 8:
            loop.save(case.save_in_window)
        if is_last and case.evaluates == "after the step":
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        called.eval()
        with torch.no_grad():
            losses.append(float(called(batch)))
        called.train()
        if is_last and case.evaluates == "before the step":
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        if is_last:
            note_iterate()
    if case.save:
        loop.save(case.save)
    return losses


def gather(loop: Loop, net: Net, strategy: cases.Strategy) -> dict[str, Tensor]:
    """Whole parameters by name, on every process."""
    Sharding(loop.module, loop.optimizer).drop_copies()
    if not isinstance(strategy, cases.FSDP1):
        return {f"weight.{n}": full(p.detach()).clone() for n, p in net.named_parameters()}
    with FullyShardedDataParallel.summon_full_params(loop.module):
        named = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in net.named_parameters()}
        return {f"weight.{name}": p.detach().clone() for name, p in named.items()}
