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
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy as FabricDDPStrategy
from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallelStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import FSDPPrecision, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
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

from lightning_ema_nesterov import EMANesterov, attach_ema_nesterov, codecs, one_pass
from lightning_ema_nesterov.direction import DIRECTION_KEY
from lightning_ema_nesterov.sharding import Sharding

GLOBAL_BATCH = 12
MLP_PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}
VOCAB, WIDTH = 13, 10  # 13 rows are divided by neither 2 nor 3 processes


class Tokens(Dataset[Tensor]):
    def __init__(self, num_batches: int, *, is_whole: bool = False) -> None:
        self.is_whole = is_whole
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(VOCAB, (num_batches, GLOBAL_BATCH, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, idx: int) -> Tensor:
        """This process's share of a global batch; with tensor parallelism all of it."""
        if self.is_whole:
            return self.tokens[idx]
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
        if options.get("unused"):
            self.unused = nn.Parameter(torch.ones(3, 2))
        if options.get("optimizer") == "muon":  # it takes matrices only
            for p in self.parameters():
                p.requires_grad_(p.ndim == 2)
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
        overflows = len(self.losses) == self.options.get("overflow_batch")
        return loss * (float("inf") if overflows else 1.0)

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
        if self.options.get("tensor_parallel"):
            for block in self.blocks:
                parallelize_module(block, self.device_mesh["tensor_parallel"], MLP_PLAN)
        chosen = {k: v for k, v in self.options.items() if k == "reshard_after_forward"}
        for block in self.blocks:
            fully_shard(block, mesh=mesh, **chosen)
        fully_shard(self, mesh=mesh, **chosen)

    @override
    def configure_optimizers(self) -> Any:
        params = list((self.trainer.model or self).parameters())
        params = [p for p in params if p.requires_grad]
        # A foreach kernel takes the tensors of one mesh only.
        foreach = False if self.options.get("tensor_parallel") else None
        return {
            "adamw": lambda: torch.optim.AdamW(params, lr=1e-2, foreach=foreach),
            "sgd": lambda: torch.optim.SGD(params, lr=5e-2),
            "muon": lambda: torch.optim.Muon(params, lr=1e-2),
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
            data_parallel_size=1 if options.get("tensor_parallel") else world_size(),
            tensor_parallel_size=world_size() if options.get("tensor_parallel") else 1,
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
            self.metrics.append(self._lookaheads[0].metrics.as_scalars())
            self._lookaheads[0].metrics = None


class RecordsChanges(Callback):
    """Largest change of a parameter and of a direction from one batch to the next."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        optimizer = trainer.optimizers[0]
        Sharding(trainer.strategy.model, optimizer).reshard()
        params = optimizer.param_groups[0]["params"]
        directions = [s[DIRECTION_KEY] for s in optimizer.state.values()]
        flat = [torch.cat([t.detach().flatten() for t in ts]) for ts in (params, directions)]
        self.seen.append(flat)

    def changes(self) -> list[list[float]]:
        pairs = zip(self.seen, self.seen[1:], strict=False)
        return [[float((b - a).abs().max()) for a, b in zip(*pair, strict=True)] for pair in pairs]


def make_plugins(options: dict[str, Any]) -> list[Any]:
    """Lightning turns 16-mixed into bf16-mixed on a CPU, unless the plugin is given."""
    if options.get("precision") != "16-mixed":
        return []
    if options["strategy"] == "ddp":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        return [MixedPrecision("16-mixed", "cpu", scaler)]
    plugin = FSDPPrecision("16-mixed")
    plugin.scaler = ShardedGradScaler("cpu", init_scale=2.0)
    return [plugin]


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
        parallelize_module(block, mesh["tensor"], MLP_PLAN)
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return model, rank // 2, 2


def shard_blocks(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard a model as Fabric asks for it."""
    assert isinstance(model, Model)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def set_up_with_fabric(model: Model, kind: str) -> tuple[Any, Any]:
    strategy = (
        FabricDDPStrategy()
        if kind == "fabric-ddp"
        else FabricModelParallelStrategy(shard_blocks, world_size(), tensor_parallel_size=1)
    )
    fabric = Fabric(accelerator="cpu", devices=world_size(), strategy=strategy)
    fabric.launch()
    module = fabric.setup_module(model)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    return module, fabric.setup_optimizers(optimizer)


def run_attached(options: dict[str, Any]) -> dict[str, Any]:
    """A loop in plain PyTorch, with evaluations inside and between accumulation windows."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    accumulate = options.get("accumulate", 1)
    model = Model({"strategy": "attached", **options})
    module: Any
    optimizer: Any
    if options["attach"].startswith("fabric"):
        module, optimizer = set_up_with_fabric(model, options["attach"])
        rank, num_shares = dist.get_rank(), world_size()
    else:
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


def count_kernel_calls() -> list[int]:
    """Have the compiled kernel note its calls that came back."""
    calls: list[int] = []
    compiled = one_pass._compiled

    def counted(*tensors: Tensor) -> None:
        compiled(*tensors)
        calls.append(tensors[0].numel())

    one_pass._compiled = counted
    return calls


def make_callbacks(options: dict[str, Any]) -> list[Callback]:
    """The method in the variant that a test asks for, and what records or saves beside it."""
    kind = Measures if options.get("measure") else EMANesterov
    kind = CountsCommunication if options.get("count") else kind
    CountsCommunication.counts, Measures.metrics = [], []
    forms: dict[str, Any] = {
        "compile": options.get("compile_method", False),
        "direction_dtype": options.get("direction_dtype", "float32"),
    }
    one_pass._MIN_ELEMENTS = codecs._MIN_ELEMENTS = 1  # the model is small
    codecs.BLOCK_SIZE = 4
    forms["rest"] = options.get("rest", 1)
    callback = kind(options.get("step_size", 0.5), 0.9, warmup=1, total_steps=8, **forms)
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
    if options.get("overflow_batch"):
        callbacks.append(RecordsChanges())
    return callbacks


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Train with the Trainer; return what the test compares."""
    accumulate = options.get("accumulate", 1)
    model, callbacks, plugins = Model(options), make_callbacks(options), make_plugins(options)
    trainer = make_trainer(
        callbacks,
        enable_checkpointing="checkpoints" in options,
        max_epochs=options.get("num_steps", 8) // 2,
        strategy=make_strategy(options),
        devices=world_size(),
        accumulate_grad_batches=accumulate,
        precision=None if plugins else options.get("precision", "32-true"),
        plugins=plugins,
        val_check_interval=options.get("val_check_interval", 1.0),
        use_distributed_sampler=False,
    )
    val = DataLoader(Tokens(1), batch_size=None) if options.get("validate") else None
    is_whole = options.get("tensor_parallel", False)
    train = DataLoader(Tokens(2 * accumulate, is_whole=is_whole), batch_size=None)
    module = torch.compile(model, backend="eager") if options.get("compile") else model
    reshard = Sharding.reshard
    if options.get("never_reshard"):
        Sharding.reshard = lambda self: None  # type: ignore[method-assign]
    kernel_calls = count_kernel_calls()
    trainer.fit(module, train, val, ckpt_path=options.get("load"))
    Sharding.reshard = reshard  # type: ignore[method-assign]
    if options.get("save"):
        trainer.save_checkpoint(options["save"])
    return {
        "tensors": gather(trainer, model),
        "group": {
            key: value
            for key, value in trainer.optimizers[0].param_groups[0].items()
            if key.startswith("ema_nesterov")
        },
        "counts": CountsCommunication.counts,
        "kernel_calls": kernel_calls,
        "metrics": Measures.metrics,
        "changes": [c.changes() for c in callbacks if isinstance(c, RecordsChanges)],
    }


def main() -> None:
    """Run every configuration of the file that the command line names."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for options in json.loads((folder / sys.argv[2]).read_text()):
        name = options["name"]
        try:
            result = run_attached(options) if "attach" in options else run(options)
        except MisconfigurationException as error:
            if not options.get("may_fail"):
                raise
            result = {"error": str(error)}
        if os.environ.get("RANK", "0") == "0":
            torch.save(result, folder / f"{name}.pt")
        if dist.is_initialized():
            dist.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # torch's communication threads can abort the interpreter's own way out


if __name__ == "__main__":
    main()
