"""One process of a distributed run. ``tests/test_distributed.py`` starts it and compares."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy as FabricDDPStrategy
from lightning.fabric.strategies import FSDPStrategy as FabricFSDPStrategy
from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallelStrategy
from lightning.pytorch import Callback, LightningModule, Trainer, strategies
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import FSDPPrecision, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
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
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_ema_nesterov import EMANesterov, attach_ema_nesterov
from lightning_ema_nesterov.core.sharding import Sharding, local
from lightning_ema_nesterov.peers import GPA, SNOO
from lightning_ema_nesterov.rules import codecs
from lightning_ema_nesterov.rules import ema_joined as one_pass
from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.toys import make_trainer

GLOBAL_BATCH = 12
MLP_PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}
VOCAB, WIDTH = 13, 10  # 13 rows are divided by neither 2 nor 3 processes


class Tokens(Dataset[Tensor]):
    def __init__(self, num_batches: int, rank: int = 0, num_shares: int = 1) -> None:
        self.rank, self.num_shares = rank, num_shares
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(VOCAB, (num_batches, GLOBAL_BATCH, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, idx: int) -> Tensor:
        """One process's share of a global batch; those of one tensor-parallel group share it."""
        size = GLOBAL_BATCH // self.num_shares
        return self.tokens[idx, self.rank * size : (self.rank + 1) * size]


def fail(fault: str, *, is_whole_file: bool) -> None:
    """Have the last process die or raise, all be asked to end, or the next save be cut short."""
    is_last = rank() == world_size() - 1
    writes = rank() == 0 if is_whole_file else is_last
    if fault == "kill" and is_last:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "raise" and is_last:
        raise ZeroDivisionError("on purpose")
    if fault == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
    if fault in ("kill-in-write", "full-disk") and writes:
        fail_to_write(fault)
    if fault == "kill-before-last-file":
        die_before_last_file()


def fail_to_write(fault: str) -> None:
    """Have a process die in the middle of a write, or find the disk full there.

    The kernel does it: a write past the limit ends the process, as SIGKILL would, or returns an
    error, as that of a full disk does.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    is_killed = fault == "kill-in-write"
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if is_killed else signal.SIG_IGN)


def die_before_last_file() -> None:
    """Have a process die when the shards of a folder are whole and what goes with them is not."""
    save = torch.save

    def save_or_die(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(f, Path) and f.name == "meta.pt":
            os.kill(os.getpid(), signal.SIGKILL)
        save(obj, f, *args, **kwargs)

    torch.save = save_or_die


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def tensor_parallel_size(options: dict[str, Any]) -> int:
    """How many processes share each matrix; ``True`` stands for all of them."""
    chosen = options.get("tensor_parallel", 1)
    return world_size() if chosen is True else int(chosen)


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
        self.temperature = nn.Parameter(torch.ones(1))  # all but one process hold none of it
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
                x = recompute(block, x, use_reentrant=False)
            else:
                x = block(x)
        logits = self.head(x) * self.temperature
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch)
        if self.options.get("fault") and len(self.losses) == self.options["fault_batch"]:
            fail(self.options["fault"], is_whole_file=self.options["strategy"] == "ddp")
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
        if self.options.get("tensor_parallel"):
            for block in self.blocks:
                parallelize_module(block, self.device_mesh["tensor_parallel"], MLP_PLAN)
        if self.options.get("compile"):  # the Trainer takes no compiled module with this strategy
            for block in self.blocks:
                block.compile(backend="eager")
        shard_blocks(self, mesh, **reshard_option(self.options))

    @override
    def configure_optimizers(self) -> Any:
        params = list((self.trainer.model or self).parameters())
        params = [p for p in params if p.requires_grad]
        # A foreach kernel takes the tensors of one mesh only.
        foreach = False if self.options.get("tensor_parallel") else None
        return {
            "adamw": lambda: torch.optim.AdamW(params, lr=1e-2, foreach=foreach),
            "fused": lambda: torch.optim.AdamW(params, lr=1e-2, fused=True),
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
            state_dict_type=options.get("state_dict_type", "sharded").replace(
                "full-after-check", "sharded"
            ),
        )
    if options["strategy"] == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=world_size() // tensor_parallel_size(options),
            tensor_parallel_size=tensor_parallel_size(options),
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
        with full_state_dict_context(root):
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
        Sharding(trainer.strategy.model, trainer.optimizers[0]).reshard()
        optimizer = trainer.optimizers[0]
        # FSDP (1) gives a parameter no gradient where a process holds none of it.
        directions = [
            optimizer.state.get(p, {}).get(DIRECTION_KEY, torch.zeros_like(p))
            for p in optimizer.param_groups[0]["params"]
        ]
        flat = torch.cat([m.detach().flatten() for m in local(directions)])
        self.after.append((self._params(trainer), flat))

    def _params(self, trainer: Trainer) -> Tensor:
        params = local(trainer.optimizers[0].param_groups[0]["params"])
        return torch.cat([p.detach().flatten() for p in params])


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
        trainer.strategy._state_dict_type = "full"
        vars(strategies.fsdp)["_get_full_state_dict_context"] = full_state_dict_context


def full_state_dict_context(module: nn.Module, **kwargs: Any) -> Any:
    return FullyShardedDataParallel.state_dict_type(
        module,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=False, rank0_only=False),
        FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=False),
    )


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
    kind = options["attach"]
    if kind == "ddp":
        return DistributedDataParallel(model), rank(), world_size()
    if kind.startswith("fsdp1"):
        is_hybrid = kind == "fsdp1-hybrid"
        wrapped = FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            sharding_strategy=ShardingStrategy[options.get("sharding", "FULL_SHARD")],
            use_orig_params=options.get("use_orig_params", True),
            device_id=torch.device("cpu"),
            device_mesh=init_device_mesh("cpu", (2, 2)) if is_hybrid else None,
        )
        return wrapped, rank(), world_size()
    # Two dimensions: the MLPs are split, or all is replicated, over one; all is split over another.
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")) if world_size() == 4 else None
    if kind == "tp":
        assert two is not None
        for block in model.blocks:
            parallelize_module(block, two["b"], MLP_PLAN)
        shard_blocks(model, two["a"], **reshard_option(options))
        return model, rank() // 2, 2
    shard_blocks(model, two or init_device_mesh("cpu", (world_size(),)), **reshard_option(options))
    return model, rank(), world_size()


def reshard_option(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k == "reshard_after_forward"}


def shard_blocks(model: Model, mesh: DeviceMesh, **kwargs: Any) -> Model:
    """Shard as FSDP2 is meant to be used: by default it keeps the root's parameters gathered."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **kwargs)
    fully_shard(model, mesh=mesh, **kwargs)
    return model


class CPUFabricFSDPStrategy(FabricFSDPStrategy):
    """As :class:`CPUFSDPStrategy`."""

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **self._fsdp_kwargs)

    @override
    def module_sharded_context(self) -> AbstractContextManager[None]:
        return nullcontext()


def make_fabric(kind: str) -> Fabric:
    strategies: dict[str, Callable[[], Any]] = {
        "fabric-ddp": FabricDDPStrategy,
        "fabric-fsdp1": lambda: CPUFabricFSDPStrategy(auto_wrap_policy=ModuleWrapPolicy({Block})),
        "fabric-fsdp2": lambda: FabricModelParallelStrategy(
            lambda model, mesh: shard_blocks(model, mesh["data_parallel"]), world_size(), 1
        ),
    }
    fabric = Fabric(accelerator="cpu", devices=world_size(), strategy=strategies[kind]())
    fabric.launch()
    return fabric


@dataclass
class Attached:
    """What a loop of one's own trains and saves, with Fabric or without."""

    module: Any
    optimizer: Any
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
            loss.backward()

    def save(self, path: str) -> None:
        if self.fabric:
            self.fabric.save(path, {"model": self.module, "optimizer": self.optimizer})
        else:
            weights, state = get_state_dict(self.module, self.optimizer)
            checkpoint.save({"weights": weights, "state": state}, checkpoint_id=path)

    def load(self, path: str) -> None:
        if self.fabric:
            self.fabric.load(path, {"model": self.module, "optimizer": self.optimizer})
        else:
            weights, state = get_state_dict(self.module, self.optimizer)
            checkpoint.load({"weights": weights, "state": state}, checkpoint_id=path)
            set_state_dict(
                self.module, self.optimizer, model_state_dict=weights, optim_state_dict=state
            )


def run_attached(options: dict[str, Any]) -> dict[str, Any]:
    """Train in a loop of one's own; return the weights."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    model = Model({"strategy": "attached", **options})
    model.to(getattr(torch, options.get("dtype", "float32")))
    module: Any
    optimizer: Any
    kind, rank_of_share, num_shares = options["attach"], rank(), world_size()
    if kind.startswith("fabric"):
        fabric = make_fabric(kind)
        module = fabric.setup_module(model)
        optimizer = fabric.setup_optimizers(torch.optim.AdamW(module.parameters(), lr=1e-2))
        attached = Attached(module, optimizer, fabric)
    else:
        module, rank_of_share, num_shares = wrap(model, options)
        # A foreach kernel takes the tensors of one mesh only.
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, foreach=False)
        attached = Attached(module, optimizer, None)
    if options.get("load_first"):
        attached.load(options["load_first"])
    called = torch.compile(module, backend="eager") if options.get("compile") else module
    if not options.get("plain"):
        handle = attach_ema_nesterov(optimizer, called, ema_decay=0.9, warmup=1, total_steps=8)
        handle.start_at(options.get("start", 0))
    if options.get("load"):
        attached.load(options["load"])
    data = Tokens(2 * options.get("accumulate", 1), rank_of_share, num_shares)
    with without_reshard() if options.get("never_reshard") else nullcontext():
        train_attached(attached, called, data, options)
    Sharding(module, optimizer).reshard()
    if "fsdp1" in kind:
        with FullyShardedDataParallel.summon_full_params(module):
            named = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in model.named_parameters()}
            weights = {f"weight.{name}": p.detach().clone() for name, p in named.items()}
    else:
        weights = {f"weight.{n}": full(p.detach()).clone() for n, p in model.named_parameters()}
    return {"tensors": weights}


def train_attached(attached: Attached, called: Any, data: Tokens, options: dict[str, Any]) -> None:
    """Evaluations inside and between accumulation windows, and checkpoints where asked."""
    optimizer, accumulate = attached.optimizer, options.get("accumulate", 1)
    first, last = options.get("start", 0), options.get("num_steps", 8)
    for idx in range(first * accumulate, last * accumulate):
        batch = data[idx % len(data)]
        is_last = idx % accumulate == accumulate - 1
        with nullcontext() if is_last else attached.no_sync():
            attached.backward(called(batch) / accumulate)
        if idx == options.get("save_batch"):
            attached.save(options["save_in_window"])
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
    if options.get("save"):
        attached.save(options["save"])


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
    forms["rest"] = options.get("rest", 0)
    callback: Callback = kind(options.get("step_size", 0.5), 0.9, warmup=1, total_steps=8, **forms)
    if "peer" in options:
        peers = {"gpa": GPA(0.7, 0.9), "snoo": SNOO(3, 0.8, 0.5)}
        callback = peers[options["peer"]]
    callbacks: list[Callback] = [] if options.get("plain") else [callback]
    if options.get("checkpoints"):
        name = options.get("checkpoint_name", "{step}")  # a fixed name is written over
        callbacks.append(
            ModelCheckpoint(
                options["checkpoints"],
                name,
                save_top_k=-1 if name == "{step}" else 1,
                save_on_exception=options.get("fault") == "terminate",
            )
        )
    if options.get("record"):
        callbacks.append(RecordsSteps())
    if options.get("in_place"):
        callbacks.append(SavesInPlace())
    if options.get("state_dict_type") == "full-after-check":
        callbacks.append(SavesWholeFile())
    return callbacks


@contextmanager
def without_reshard() -> Iterator[None]:
    reshard = Sharding.reshard
    Sharding.reshard = lambda self: None  # type: ignore[method-assign]
    yield
    Sharding.reshard = reshard  # type: ignore[method-assign]


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Train with the Trainer; return what the test compares."""
    accumulate = options.get("accumulate", 1)
    model, callbacks, plugins = Model(options), make_callbacks(options), make_plugins(options)
    trainer = make_trainer(
        callbacks,
        enable_checkpointing="checkpoints" in options,
        max_epochs=options.get("num_steps", 8) // 2,
        strategy=make_strategy(options),
        devices=local_world_size(),
        num_nodes=world_size() // local_world_size(),
        accumulate_grad_batches=accumulate,
        precision=None if plugins else options.get("precision", "32-true"),
        plugins=plugins,
        val_check_interval=options.get("val_check_interval", 1.0),
        use_distributed_sampler=False,
    )
    val = (
        DataLoader(Tokens(1, rank(), world_size()), batch_size=None)
        if options.get("validate")
        else None
    )
    size = tensor_parallel_size(options)
    tokens = Tokens(2 * accumulate, rank() // size, world_size() // size)
    train = DataLoader(tokens, batch_size=None)
    is_compiled = options.get("compile") and options["strategy"] != "fsdp2"
    module = torch.compile(model, backend="eager") if is_compiled else model
    kernel_calls = count_kernel_calls()
    with without_reshard() if options.get("never_reshard") else nullcontext():
        trainer.fit(module, train, val, ckpt_path=options.get("load"))
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
        "steps": [(c.before, c.after) for c in callbacks if isinstance(c, RecordsSteps)],
    }


def run_apart(options: dict[str, Any], folder: Path) -> None:
    """Run one configuration in a process of its own, and write down with which code it ended."""
    os.environ["MASTER_PORT"] = str(options["port"])
    pid = os.fork()  # all is imported, and nothing started: much cheaper than a new interpreter
    if pid == 0:
        code = 1
        try:
            code = run_one(options, folder)
        except BaseException:
            traceback.print_exc()
        leave(code)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    (folder / f"{options['name']}-{rank()}.code").write_text(str(code))


def run_one(options: dict[str, Any], folder: Path) -> int:
    try:
        result = run_attached(options) if "attach" in options else run(options)
    except SystemExit as end:  # the Trainer's answer to SIGTERM
        return int(end.code or 0)
    except (Exception, checkpoint.CheckpointException) as error:  # the latter is not an Exception
        if not options.get("may_fail"):
            raise
        result = {"error": f"{type(error).__name__}: {error}"}
    if rank() == 0:
        torch.save(result, folder / f"{options['name']}.pt")
    if dist.is_initialized():
        dist.barrier()
    return 0


def leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # torch's communication threads can abort the interpreter's own way out


def main() -> None:
    """Run every configuration of the file that the command line names."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for options in json.loads((folder / sys.argv[2]).read_text()):
        if "port" in options:
            run_apart(options, folder)
        else:
            run_one(options, folder)
    if dist.is_initialized():
        dist.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main()
