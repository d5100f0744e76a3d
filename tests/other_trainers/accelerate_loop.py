"""A loop with Accelerate, on one process or on several that share or shard the model."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lightning_ema_nesterov import attach_ema_nesterov
from tests.other_trainers.problem import EMA_DECAY, Net, adamw, examples

NUM_STEPS = 8


def lr_factor(step_idx: int) -> float:
    return 1.0 - step_idx / 10


def make_accelerator(strategy: str, accumulate: int) -> Any:
    accelerate: Any = import_module("accelerate")  # is not in the environment of the other tests
    state = accelerate.state
    for part in (state.AcceleratorState, state.GradientState, state.PartialState):
        part._reset_state()  # they outlive the Accelerator of another test
    plugin = None
    if strategy == "fsdp2":
        plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2)
    accelerator = accelerate.Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulate,
        fsdp_plugin=plugin,
        # The processes share each batch, and the scheduler steps once for all of them.
        dataloader_config=accelerate.DataLoaderConfiguration(split_batches=True),
    )
    if plugin is not None:
        # Accelerate shards on accelerators only: here it is told that it has some.
        for part in (state.PartialState, state.AcceleratorState):
            part._shared_state["distributed_type"] = accelerate.DistributedType.FSDP
        state.AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator


class Loop:
    """What is trained: everything prepared, then attached."""

    def __init__(
        self,
        strategy: str = "one",
        *,
        accumulate: int = 1,
        dtype: Any = torch.float64,
        **kwargs: Any,
    ) -> None:
        self.accelerator = make_accelerator(strategy, accumulate)
        self.net = Net(dtype)
        optimizer = adamw(self.net.parameters())
        rows: Any = examples(dtype)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            self.net,
            optimizer,
            LambdaLR(optimizer, lr_factor),
            DataLoader(rows, batch_size=4 // accumulate),
        )
        options = {"ema_decay": EMA_DECAY, "warmup": 0, "rest": 0, **kwargs}
        self.handle = attach_ema_nesterov(self.optimizer, self.model, **options)
        self.eval_losses: list[float] = []

    def train(self, num_steps: int) -> None:
        """One epoch is one optimizer step."""
        for _ in range(num_steps):
            for batch in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.model(**batch)["loss"])
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                self.evaluate()

    def evaluate(self) -> None:
        """Also in the middle of an accumulation window."""
        self.model.eval()
        with torch.no_grad():
            losses = [self.model(**batch)["loss"] for batch in self.loader]
        self.model.train()
        gathered = self.accelerator.gather(torch.stack(losses))
        self.eval_losses.append(float(gathered.mean()))

    def params(self) -> list[Tensor]:
        if isinstance(self.net, FSDPModule):
            self.net.reshard()  # an evaluation leaves the root gathered
        found = [p.detach() for p in self.net.parameters()]
        return [p.full_tensor() if isinstance(p, DTensor) else p.clone() for p in found]


def main(folder: Path, strategy: str, accumulate: str) -> None:
    loop = Loop(strategy, accumulate=int(accumulate))
    loop.train(4)
    loop.accelerator.save_state(str(folder / "half"))
    loop.train(NUM_STEPS - 4)
    resumed = Loop(strategy, accumulate=int(accumulate))
    resumed.accelerator.load_state(str(folder / "half"))
    resumed.train(NUM_STEPS - 4)
    result = {
        "params": loop.params(),
        "resumed": resumed.params(),
        "eval_losses": loop.eval_losses,
        "is_sharded": isinstance(loop.net, FSDPModule),
    }
    if loop.accelerator.is_main_process:
        torch.save(result, folder / "result.pt")
    loop.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
