"""LitGPT on two CPU processes, with FSDP1, which it uses on several GPUs, and with FSDP2.

Called for test_processes.py, in the folder of its runs: all cases in the same processes.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jsonargparse
import litgpt.__main__
import torch
import torch._dynamo
from lightning.fabric.strategies.fsdp import FSDPStrategy
from litgpt import pretrain
from litgpt.utils import CLI
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from typing_extensions import override

from lightning_ema_nesterov.litgpt.launch import launch
from tests.processes import environment_of


class CPUFSDPStrategy(FSDPStrategy):
    """Lightning passes no device to FSDP on a CPU, where only sharded checkpoints can be saved."""

    def __init__(self, **kwargs: Any) -> None:
        options = {**kwargs, "state_dict_type": "sharded", "sharding_strategy": "FULL_SHARD"}
        super().__init__(**options)

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            module,
            sharding_strategy=self.sharding_strategy,
            mixed_precision=self.mixed_precision_config,
            device_id=torch.device("cpu"),
            **self._fsdp_kwargs,
        )

    @override
    def module_sharded_context(self) -> AbstractContextManager[None]:
        return nullcontext()


def train(config: str, *arguments: str) -> None:
    sys.argv = ["litgpt", "--config", config, *arguments]
    CLI(pretrain.setup)


def work(rank: int, num_processes: int, folder: Path, port: int) -> None:
    """Be one of the processes that torchrun would start."""
    os.environ |= environment_of(rank, num_processes, port)
    os.chdir(folder)
    torch._dynamo.config.disable = True
    # It parses the command line again, half a second for each checkpoint.
    for module in (jsonargparse, litgpt.__main__):  # only its help would need it
        vars(module)["set_docstring_parse_options"] = lambda **kwargs: None
    vars(pretrain).update(save_hyperparameters=lambda *args: None, FSDPStrategy=CPUFSDPStrategy)
    train("adamw.yaml", "--out_dir", "with_validation", "--eval.interval", "1")
    train("adamw.yaml", "--out_dir", "without_validation", "--eval.interval", "1000")
    try:
        train("muon.yaml")
    except RuntimeError as error:
        Path(f"refusal_{torch.distributed.get_rank()}.txt").write_text(str(error))

    fsdp2 = ("--strategy", "fsdp2", "--config", "muon.yaml", "--out_dir")
    launch([*fsdp2, "whole"])
    launch([*fsdp2, "continued", "--resume", "whole/step-00000010/lit_model.pth"])
