"""A loop in the manner of torchtitan: fully_shard, stateful parts, torch.distributed.checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from lightning_ema_nesterov import attach_ema_nesterov
from tests.other_trainers.problem import EMA_DECAY, Net, adamw, whole_batch

NUM_STEPS = 10
WARMUP = 2
REST = 3
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # names instead of groups


def lr_factor(step_idx: int) -> float:
    return 1.0 - step_idx / 20


class Weights(Stateful):
    """The model, for a checkpoint."""

    def __init__(self, model: Net) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self.model)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state_dict)


class OptimizerState(Stateful):
    """The optimizer, for a checkpoint."""

    def __init__(self, model: Net, optimizer: Any, options: StateDictOptions | None) -> None:
        self.model, self.optimizer, self.options = model, optimizer, options

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.optimizer, options=self.options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.model, self.optimizer, state_dict, options=self.options)


class Loop:
    """What is trained: sharded, then attached."""

    def __init__(self, options: StateDictOptions | None) -> None:
        self.model = Net()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (self.model.hidden, self.model.out):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = adamw(self.model.parameters())
        self.scheduler = LambdaLR(self.optimizer, lr_factor)
        self.handle = attach_ema_nesterov(
            self.optimizer,
            self.model,
            ema_decay=EMA_DECAY,
            warmup=WARMUP,
            rest=REST,
            total_steps=NUM_STEPS,
        )
        self.parts = {
            "model": Weights(self.model),
            "optimizer": OptimizerState(self.model, self.optimizer, options),
            "scheduler": self.scheduler,
        }
        own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        self.batch = {key: value[own] for key, value in whole_batch().items()}

    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.optimizer.zero_grad()
            self.model(**self.batch)["loss"].backward()
            self.optimizer.step()
            self.scheduler.step()

    def params(self) -> list[Tensor]:
        return [cast(DTensor, p.detach()).full_tensor() for p in self.model.parameters()]


def main(folder: Path, form: str) -> None:
    dist.init_process_group("gloo")
    options = FLAT if form == "flat" else None
    loop = Loop(options)
    loop.train(4)
    save(loop.parts, checkpoint_id=folder / "half")
    loop.train(NUM_STEPS - 4)
    resumed = Loop(options)
    load(resumed.parts, checkpoint_id=folder / "half")
    half = resumed.params()
    resumed.train(NUM_STEPS - 4)
    result = {
        "params": loop.params(),
        "half": half,
        "resumed": resumed.params(),
        "num_steps": resumed.optimizer.state_dict()["param_groups"][0]["ema_nesterov_step"],
    }
    if dist.get_rank() == 0:
        torch.save(result, folder / "result.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
