"""``ema-nesterov pretrain``: LitGPT's own command with another strategy on several devices."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, cast

import litgpt.__main__
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.strategy import Strategy
from litgpt import pretrain
from litgpt.model import Block
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lightning_ema_nesterov.litgpt.low_rank_models import convert_before_setup
from lightning_ema_nesterov.litgpt.run import locals_of

__all__ = ["STRATEGIES", "launch"]

STRATEGIES = ("ddp", "fsdp2")
"""What ``--strategy`` may be."""
# Processes that Lightning starts run the same command, from which --strategy was taken.
_STRATEGY_VARIABLE = "EMA_NESTEROV_STRATEGY"


def launch(arguments: Sequence[str]) -> None:
    """Run ``litgpt pretrain``.

    Args:
        arguments: Those of ``litgpt pretrain``, and ``--strategy``, with which several devices are
            used instead of LitGPT's FSDP1: ``ddp`` or ``fsdp2``.
    """
    parser = argparse.ArgumentParser("ema-nesterov pretrain", add_help=False, allow_abbrev=False)
    default = os.environ.get(_STRATEGY_VARIABLE, "ddp")
    parser.add_argument("--strategy", choices=STRATEGIES, default=default)
    options, rest = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(rest):
        print(f"--strategy {{{','.join(STRATEGIES)}}}: for several devices, default ddp; and:\n")
    os.environ[_STRATEGY_VARIABLE] = options.strategy
    sys.argv[1:] = ["pretrain", *rest]
    cast(Any, pretrain).FSDPStrategy = _InsteadOfFSDP1
    if options.strategy == "ddp":
        _initialize_and_convert()
    litgpt.__main__.main()


def _initialize_and_convert() -> None:
    """Have LitGPT make low-rank layers where it has made and not yet wrapped the model."""
    initialize_weights = pretrain.initialize_weights

    def initialize_then_convert(fabric: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        initialize_weights(fabric, model, *args, **kwargs)
        run = cast(dict[str, Any], locals_of(pretrain.main))
        convert_before_setup(model, run["optimizer"])

    cast(Any, pretrain).initialize_weights = initialize_then_convert


class _InsteadOfFSDP1:
    """What LitGPT makes when it thinks that it makes its strategy."""

    def __new__(cls, **kwargs: object) -> Strategy:  # type: ignore[misc]  # it makes another object
        if os.environ[_STRATEGY_VARIABLE] == "ddp":
            return DDPStrategy()
        setup = cast(dict[str, Any], locals_of(pretrain.setup))
        return ModelParallelStrategy(
            _shard,
            data_parallel_size=setup["devices"] * setup["num_nodes"],
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )


def _shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model
