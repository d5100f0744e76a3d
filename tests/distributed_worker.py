"""One process of a distributed run. ``tests/test_distributed.py`` starts it and compares."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from toys import make_trainer
from typing_extensions import override

from lightning_ema_nesterov import EMANesterov, attach_ema_nesterov
from lightning_ema_nesterov.direction import DIRECTION_KEY
from lightning_ema_nesterov.sharding import Sharding

GLOBAL_BATCH = 12
VOCAB, WIDTH = 13, 10  # 13 rows are divided by neither 2 nor 3 processes


class Tokens(Dataset[Tensor]):
    def __init__(self, num_batches: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(VOCAB, (num_batches, GLOBAL_BATCH, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, idx: int) -> Tensor:
        """This process's share of a global batch."""
        return self.share(idx, int(os.environ.get("RANK", "0")), world_size())

    def share(self, idx: int, rank: int, num_shares: int) -> Tensor:
        size = GLOBAL_BATCH // num_shares
        return self.tokens[idx, rank * size : (rank + 1) * size]


def fail(fault: str) -> None:
    """Have a process die, raise, or be asked to end."""
    is_last = int(os.environ.get("RANK", "0")) == world_size() - 1
    if fault == "kill" and is_last:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "raise" and is_last:
        raise ZeroDivisionError("on purpose")
    if fault == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mixed = x.cumsum(dim=1) / x.shape[1]
        out: Tensor = x + self.down(functional.gelu(self.up(self.norm(mixed))))
        return out


class Model(LightningModule):
    """Tied embeddings, and parameters that belong to the root itself."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options
        self.save_steps: set[int] = set()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.losses: list[float] = []
        self.comm_counts: list[int] = []

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens[:, :-1]) * self.scale
        for block in self.blocks:
            if self.options.get("activation_checkpointing"):
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        logits = self.head(x)
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch)
        if self.options.get("fault") and len(self.losses) == self.options["fault_batch"]:
            fail(self.options["fault"])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self(batch)

    @override
    def configure_model(self) -> None:
        if self.options["strategy"] != "fsdp2" or hasattr(self, "is_configured"):
            return
        self.is_configured = True
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        # By default FSDP2 keeps the root's parameters after a forward pass, and no others.
        chosen = {k: v for k, v in self.options.items() if k == "reshard_after_forward"}
        for block in self.blocks:
            fully_shard(block, mesh=mesh, **chosen)
        fully_shard(self, mesh=mesh, **chosen)

    @override
    def configure_optimizers(self) -> Any:
        params = list((self.trainer.model or self).parameters())
        return {
            "adamw": lambda: torch.optim.AdamW(params, lr=1e-2),
            "sgd": lambda: torch.optim.SGD(params, lr=5e-2),
            "momentum": lambda: torch.optim.SGD(params, lr=2e-2, momentum=0.9),
        }[self.options.get("optimizer", "adamw")]()


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

    @override
    def model_sharded_context(self) -> AbstractContextManager[None]:
        return nullcontext()


def make_strategy(options: dict[str, Any]) -> Strategy | str:
    if options["strategy"] == "ddp":
        return DDPStrategy()
    if options["strategy"] == "fsdp1":
        return CPUFSDPStrategy(
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            sharding_strategy=ShardingStrategy[options.get("sharding", "FULL_SHARD")],
            use_orig_params=options.get("use_orig_params", True),
            state_dict_type=options.get("state_dict_type", "sharded"),
        )
    if options["strategy"] == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=world_size(),
            tensor_parallel_size=1,
            save_distributed_checkpoint=options.get("distributed_checkpoint", True),
        )
    return "auto"


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather(trainer: Trainer, model: Model) -> dict[str, Tensor]:
    """Whole parameters, base state and directions by name, on every process."""
    root, optimizer = trainer.strategy.model, trainer.optimizers[0]
    assert root is not None
    Sharding(root, optimizer).reshard()
    if model.options["strategy"] == "fsdp1":
        with FullyShardedDataParallel.state_dict_type(
            root,
            torch.distributed.fsdp.StateDictType.FULL_STATE_DICT,
            torch.distributed.fsdp.FullStateDictConfig(offload_to_cpu=False, rank0_only=False),
            torch.distributed.fsdp.FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=False),
        ):
            weights = root.state_dict()
            optim = FullyShardedDataParallel.optim_state_dict(root, optimizer)
        states = optim["state"]
    else:
        weights = {name: full(p.detach()) for name, p in model.named_parameters()}
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        states = {names[p]: s for p, s in optimizer.state.items()}
    out = {f"weight.{name}": value.clone() for name, value in weights.items()}
    for name, state in states.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                out[f"{key}.{name}"] = full(value).clone()
    return dict(sorted(out.items()))


class CountsCommunication(EMANesterov):
    """Counts the collectives of ours: in the moves and in the optimizer's hooks."""

    counts: list[int] = []  # noqa: RUF012

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for lookahead in self._lookaheads:
            for name in ("extrapolate", "pause", "retract"):
                setattr(lookahead, name, self._counted(getattr(lookahead, name)))
            for name in ("_begin", "_end"):
                setattr(lookahead._hooks, name, self._counted(getattr(lookahead._hooks, name)))

    def _counted(self, method: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            with CommDebugMode() as mode:
                result = method(*args, **kwargs)
            self.counts.append(mode.get_total_counts())
            return result

        return counted


class Measures(CountsCommunication):
    """Measures every step."""

    metrics: list[dict[str, float]] = []  # noqa: RUF012

    @override
    def on_before_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._lookaheads[0].will_measure = True

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self._lookaheads[0].metrics is not None:
            self.metrics.append(vars(self._lookaheads[0].metrics))
            self._lookaheads[0].metrics = None


def wrap(model: Model, options: dict[str, Any]) -> tuple[nn.Module, int, int]:
    """Return the module to call, and which share of the batch it gets."""
    kind, rank = options["attach"], int(os.environ.get("RANK", "0"))
    if kind == "ddp":
        return DistributedDataParallel(model), rank, world_size()
    if kind == "fsdp1":
        wrapped = FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            sharding_strategy=ShardingStrategy[options.get("sharding", "FULL_SHARD")],
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
        return wrapped, rank, world_size()
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, rank, world_size()
    # Two dimensions: the MLPs are split over the second, everything over the first.
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for block in model.blocks:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh["tensor"], plan)
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return model, rank // 2, 2


def run_attached(options: dict[str, Any]) -> dict[str, Any]:
    """A loop in plain PyTorch, with evaluations inside and between accumulation windows."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    accumulate = options.get("accumulate", 1)
    model = Model({"strategy": "attached", **options})
    module, rank, num_shares = wrap(model, options)
    # A foreach kernel takes the tensors of one mesh only.
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, foreach=False)
    called = torch.compile(module, backend="eager") if options.get("compile") else module
    if not options.get("plain"):
        attach_ema_nesterov(optimizer, called, ema_decay=0.9, warmup=1, rest=1, total_steps=8)
    data = Tokens(2 * accumulate)
    for idx in range(8 * accumulate):
        batch = data.share(idx % len(data), rank, num_shares)
        is_last = idx % accumulate == accumulate - 1
        no_sync = getattr(module, "no_sync", nullcontext)
        with nullcontext() if is_last else no_sync():
            (called(batch) / accumulate).backward()
        if is_last and options.get("evaluate_after_step"):
            optimizer.step()
            optimizer.zero_grad()
        called.eval()
        with torch.no_grad():
            called(batch)
        called.train()
        if is_last and not options.get("evaluate_after_step"):
            optimizer.step()
            optimizer.zero_grad()
    Sharding(module, optimizer).reshard()
    if options["attach"] == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(module):
            named = {
                n.replace("_fsdp_wrapped_module.", ""): p for n, p in module.named_parameters()
            }
            weights = {f"weight.{name}": p.detach().clone() for name, p in named.items()}
    else:
        weights = {f"weight.{n}": full(p.detach()).clone() for n, p in model.named_parameters()}
    return {"tensors": weights}


def run(options: dict[str, Any]) -> dict[str, Any]:
    if "attach" in options:
        return run_attached(options)
    reshard = Sharding.reshard
    if options.get("never_reshard"):
        Sharding.reshard = lambda self: None  # type: ignore[method-assign]
    CountsCommunication.counts = []
    accumulate = options.get("accumulate", 1)
    num_steps = options.get("num_steps", 8)
    model = Model(options)
    kind = Measures if options.get("measure") else EMANesterov
    kind = CountsCommunication if options.get("count") else kind
    Measures.metrics = []
    callback = kind(options.get("step_size", 0.5), 0.9, warmup=1, rest=1, total_steps=8)
    callbacks: list[Callback] = [] if options.get("plain") else [callback]
    if options.get("checkpoints"):
        callbacks.append(
            ModelCheckpoint(
                options["checkpoints"],
                "{step}",
                save_top_k=-1,
                save_on_exception=options.get("fault") == "terminate",
            )
        )
    trainer = make_trainer(
        callbacks,
        enable_checkpointing="checkpoints" in options,
        max_epochs=num_steps // 2,
        strategy=make_strategy(options),
        devices=world_size(),
        accumulate_grad_batches=accumulate,
        precision=options.get("precision", "32-true"),
        val_check_interval=options.get("val_check_interval", 1.0),
        use_distributed_sampler=False,
    )
    val = DataLoader(Tokens(1), batch_size=None) if options.get("validate") else None
    train = DataLoader(Tokens(2 * accumulate), batch_size=None)
    trainer.fit(model, train, val, ckpt_path=options.get("load"))
    Sharding.reshard = reshard  # type: ignore[method-assign]
    if options.get("save"):
        trainer.save_checkpoint(options["save"])
    result: dict[str, Any] = {"tensors": gather(trainer, model), "losses": model.losses}
    result["group"] = {
        key: value
        for key, value in trainer.optimizers[0].param_groups[0].items()
        if key.startswith("ema_nesterov")
    }
    if options.get("count"):
        result["counts"] = CountsCommunication.counts
    if options.get("measure"):
        result["metrics"] = Measures.metrics
    assert options.get("plain") or any(DIRECTION_KEY in key for key in result["tensors"])
    return result


def main() -> None:
    """Run every configuration of the file that the command line names."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for options in json.loads((folder / sys.argv[2]).read_text()):
        name = options["name"]
        try:
            result = run(options)
        except MisconfigurationException as error:
            if not options.get("may_fail"):
                raise
            result = {"error": str(error)}
        if os.environ.get("RANK", "0") == "0":
            torch.save(result, folder / f"{name}.pt")
        if dist.is_initialized():
            dist.barrier()


if __name__ == "__main__":
    main()
