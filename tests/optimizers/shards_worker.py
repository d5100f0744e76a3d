"""One process of a sharded run; ``test_shards.py`` starts several and compares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_ema_nesterov import attach_ema_nesterov
from lightning_ema_nesterov.optimizers import groups_by_role
from tests.optimizers.tiny import OPTIMIZERS, WIDTH, TinyLM, loss_of, train
from tests.toys import through_a_file

NUM_STEPS = 8


class GatedLM(TinyLM):
    """With a matrix of one row, of which all processes but the first hold nothing."""

    def __init__(self, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.gate = nn.Linear(WIDTH, 1, bias=False)
        nn.init.constant_(self.gate.weight, 0.1)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        return super().forward(tokens) * torch.sigmoid(self.gate(x))


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def values(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    result = {}
    for name, p in model.named_parameters():
        result[name] = whole(p)
        for key, value in optimizer.state[p].items():
            result[f"{name}/{key}"] = whole(value)
    return result


def fsdp2(model: TinyLM) -> nn.Module:
    fully_shard(model.up)
    fully_shard(model)
    return model


def one_run(name: str, *, is_sharded: bool, with_direction: bool = False) -> dict[str, Any]:
    model = fsdp2(GatedLM()) if is_sharded else GatedLM()
    optimizer = OPTIMIZERS[name](groups_by_role(model))
    if with_direction:
        attach_ema_nesterov(optimizer, model, ema_decay=0.9, warmup=0, rest=0)
    train(model, optimizer, NUM_STEPS)
    return dict(values(model, optimizer))


def collectives_of_a_step(name: str) -> int:
    model = fsdp2(GatedLM())
    optimizer = OPTIMIZERS[name](groups_by_role(model))
    loss_of(model, 0).backward()  # type: ignore[no-untyped-call]
    with CommDebugMode() as counted:  # type: ignore[no-untyped-call]
        optimizer.step()
    return int(counted.get_total_counts())


def resumed(name: str, *, full: bool) -> dict[str, Any]:
    """Stop after five steps, and go on from the state of a distributed checkpoint."""
    options = StateDictOptions(full_state_dict=full)
    model = fsdp2(GatedLM())
    optimizer = OPTIMIZERS[name](groups_by_role(model))
    train(model, optimizer, 5)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    optimizer.zero_grad()  # a state is not made where gradients are left over
    after = OPTIMIZERS[name](groups_by_role(model))
    set_optimizer_state_dict(
        model, after, through_a_file(state) if full else state, options=options
    )
    train(model, after, NUM_STEPS - 5, start=5)
    return dict(values(model, after))


def by_columns(name: str) -> dict[str, Any]:
    """Spread each matrix along its columns, as tensor parallelism does to some."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = GatedLM()
    gradients = GatedLM()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            spread = distribute_tensor(module.weight.detach(), mesh, [Shard(1)])
            module.weight = nn.Parameter(spread)
    optimizer = OPTIMIZERS[name](groups_by_role(model))
    num_collectives = 0
    for step_idx in range(NUM_STEPS):
        # Gradients are those of a model in one piece.
        gradients.load_state_dict({key: whole(p) for key, p in model.state_dict().items()})
        gradients.zero_grad()
        loss_of(gradients, step_idx).backward()  # type: ignore[no-untyped-call]
        for p, q in zip(model.parameters(), gradients.parameters(), strict=True):
            assert q.grad is not None
            is_spread = isinstance(p, DTensor)
            p.grad = distribute_tensor(q.grad, mesh, [Shard(1)]) if is_spread else q.grad
        with CommDebugMode() as counted:  # type: ignore[no-untyped-call]
            optimizer.step()
        num_collectives = int(counted.get_total_counts())
    return {**values(model, optimizer), "collectives": torch.tensor(num_collectives)}


def refusals(name: str) -> dict[str, str]:
    """What each way to shard is answered by, before the first step."""
    messages = {}

    def fsdp1(use_orig_params: bool) -> nn.Module:
        return FullyShardedDataParallel(
            GatedLM(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )

    wraps: dict[str, Callable[[], nn.Module]] = {
        "fsdp1": lambda: fsdp1(True),
        "fsdp1_flat": lambda: fsdp1(False),
        "fsdp2": lambda: fsdp2(GatedLM()),
    }
    for kind, wrap in wraps.items():
        try:
            OPTIMIZERS[name](groups_by_role(wrap()))
            messages[kind] = "accepted"
        except ValueError as error:
            messages[kind] = str(error)
    return messages


def data_parallel(name: str) -> dict[str, Any]:
    model = TinyLM(dtype=torch.float64)
    wrapped = DistributedDataParallel(model)
    optimizer = OPTIMIZERS[name](groups_by_role(wrapped))
    train(wrapped, optimizer, NUM_STEPS)
    result: dict[str, Any] = dict(values(model, optimizer))
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    result["is_same"] = torch.tensor(all(torch.equal(mine, other) for other in others))
    return result


def main(rank: int, num_processes: int, folder: Path, port: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_processes
    )
    results: dict[str, Any] = {}
    for name in ("scale", "clipped_sgd"):
        results[f"{name}/fsdp2"] = one_run(name, is_sharded=True)
        results[f"{name}/direction"] = one_run(name, is_sharded=True, with_direction=True)
        results[f"{name}/resumed"] = resumed(name, full=False)
        results[f"{name}/resumed_full"] = resumed(name, full=True)
        results[f"{name}/collectives"] = collectives_of_a_step(name)
        results[f"{name}/columns"] = by_columns(name)
    for name in OPTIMIZERS:
        results[f"{name}/refusals"] = refusals(name)
    for name in ("apollo", "galore", "lora_pre", "scale"):
        results[f"{name}/ddp"] = data_parallel(name)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()
