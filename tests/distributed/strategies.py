"""How parameters are spread over processes: for the Trainer, for Fabric and by torch alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy as FabricDDPStrategy
from lightning.fabric.strategies.fsdp import FSDPStrategy as FabricFSDPStrategy
from lightning.fabric.strategies.model_parallel import (
    ModelParallelStrategy as FabricModelParallelStrategy,
)
from lightning.pytorch.plugins import FSDPPrecision, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_ema_nesterov.core.sharding import Sharding
from tests.distributed import cases
from tests.distributed.models import Block, Net


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def tensor_parallel_size(strategy: cases.Strategy) -> int:
    """How many processes share each matrix."""
    if not isinstance(strategy, cases.FSDP2):
        return 1
    return world_size() if strategy.tensor_parallel == "all" else strategy.tensor_parallel


def split_matrices(net: Net, mesh: DeviceMesh) -> None:
    """Split the MLPs of the blocks over one dimension of a mesh."""
    for block in net.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def shard(net: Net, mesh: DeviceMesh, reshard_after_forward: bool | None = None) -> None:
    """Shard as FSDP2 is meant to be used: by default it keeps the root's parameters gathered."""
    for module in (*net.blocks, net):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward)


class CPUFSDPStrategy(FSDPStrategy):
    """Lightning passes no device to FSDP on a CPU, and FSDP then looks for a GPU."""

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model,
            sharding_strategy=self.sharding_strategy,
            mixed_precision=self.mixed_precision_config,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )

    @contextmanager
    @override
    def model_sharded_context(self) -> Iterator[None]:
        yield


class CPUFabricFSDPStrategy(FabricFSDPStrategy):
    """As :class:`CPUFSDPStrategy`."""

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            module,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self._fsdp_kwargs,
        )

    @contextmanager
    @override
    def module_sharded_context(self) -> Iterator[None]:
        yield


def for_trainer(
    strategy: cases.Strategy, accelerator: Literal["cpu", "gpu"] = "cpu"
) -> Strategy | str:
    if isinstance(strategy, cases.DDP):
        return DDPStrategy()
    if isinstance(strategy, cases.FSDP1):
        make = CPUFSDPStrategy if accelerator == "cpu" else FSDPStrategy
        return make(
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            sharding_strategy=ShardingStrategy[strategy.sharding],
            use_orig_params=strategy.use_orig_params,
            state_dict_type="full" if strategy.checkpoint == "full" else "sharded",
        )
    if isinstance(strategy, cases.FSDP2):
        assert strategy.replicas == 1
        size = tensor_parallel_size(strategy)
        return ModelParallelStrategy(
            data_parallel_size=world_size() // size,
            tensor_parallel_size=size,
            save_distributed_checkpoint=strategy.writes_folder,
        )
    return "auto"


def plugins_for(case: cases.TrainerRun) -> list[Any]:
    """Lightning turns 16-mixed into bf16-mixed on a CPU, unless the plugin is given."""
    if case.precision != "16-mixed":
        return []
    device = "cpu" if case.accelerator == "cpu" else "cuda"
    if isinstance(case.strategy, cases.FSDP1):
        plugin = FSDPPrecision("16-mixed")
        plugin.scaler = ShardedGradScaler(device, init_scale=2.0)
        return [plugin]
    assert isinstance(case.strategy, cases.DDP)
    return [MixedPrecision("16-mixed", device, torch.amp.GradScaler(device, init_scale=2.0))]


def make_fabric(strategy: cases.Strategy) -> Fabric:
    made: Any
    if isinstance(strategy, cases.DDP):
        made = FabricDDPStrategy()
    elif isinstance(strategy, cases.FSDP1):
        made = CPUFabricFSDPStrategy(
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            sharding_strategy=ShardingStrategy[strategy.sharding],
            use_orig_params=strategy.use_orig_params,
        )
    else:
        assert strategy == cases.FSDP2()

        def shard_over_data(net: Net, mesh: DeviceMesh) -> Net:
            shard(net, mesh["data_parallel"])
            return net

        made = FabricModelParallelStrategy(shard_over_data, world_size(), 1)
    fabric = Fabric(accelerator="cpu", devices=world_size(), strategy=made)
    fabric.launch()
    return fabric


def wrap(net: Net, strategy: cases.Strategy) -> tuple[nn.Module, int, int]:
    """Return the module to call, and which share of the batch of how many it gets."""
    if isinstance(strategy, cases.DDP):
        return DistributedDataParallel(net), rank(), world_size()
    if isinstance(strategy, cases.FSDP1):
        is_hybrid = strategy.sharding == "HYBRID_SHARD"
        wrapped = FullyShardedDataParallel(
            net,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            sharding_strategy=ShardingStrategy[strategy.sharding],
            use_orig_params=strategy.use_orig_params,
            device_id=torch.device("cpu"),
            device_mesh=init_device_mesh("cpu", (2, 2)) if is_hybrid else None,
        )
        return wrapped, rank(), world_size()
    assert isinstance(strategy, cases.FSDP2)
    return net, *_shard_over_mesh(net, strategy)


def _shard_over_mesh(net: Net, strategy: cases.FSDP2) -> tuple[int, int]:
    size = tensor_parallel_size(strategy)
    if size * strategy.replicas == 1:
        shard(net, init_device_mesh("cpu", (world_size(),)), strategy.reshard_after_forward)
        return rank(), world_size()
    # Two dimensions: matrices are split, or all is replicated, over one; all is split over another.
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    if size == 1:
        shard(net, two, strategy.reshard_after_forward)
        return rank(), world_size()
    split_matrices(net, two["b"])
    shard(net, two["a"], strategy.reshard_after_forward)
    return rank() // 2, 2


def full_state_dict_context(module: nn.Module, **kwargs: Any) -> AbstractContextManager[Any]:
    """Have FSDP1 gather the state on every process, without the copy to the CPU that crashes."""
    context: AbstractContextManager[Any] = FullyShardedDataParallel.state_dict_type(
        module,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=False, rank0_only=False),
        FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=False),
    )
    return context


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a module or class inside; it must be there, or the test tests nothing."""
    former = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, former)


@contextmanager
def without_reshard(*, is_on: bool) -> Iterator[None]:
    """Keep from FSDP that its shards have changed, where ``is_on``."""
    drop_copies = (lambda self: None) if is_on else Sharding.drop_copies
    with replaced(Sharding, "drop_copies", drop_copies):
        yield
