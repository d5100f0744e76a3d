"""A run of the Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.core.sharding import Sharding
from lightning_ema_nesterov.peers import GPA, SNOO
from lightning_ema_nesterov.rules import codecs, ema_joined
from tests.distributed import cases, faults, muon, strategies
from tests.distributed.models import Net, Tokens
from tests.distributed.observers import (
    CountsMoves,
    KeepsMetrics,
    RecordsSteps,
    SavesInPlace,
    SavesWholeFile,
    counted_collectives,
    counted_kernel_calls,
)
from tests.distributed.strategies import rank, replaced, world_size
from tests.toys import make_trainer


class Module(Net, LightningModule):
    """The model as the Trainer trains it."""

    def __init__(self, case: cases.TrainerRun) -> None:
        super().__init__(
            dtype=cases.dtype_of(case.model_dtype),
            has_unused=case.has_unused,
            only_matrices=case.optimizer in ("muon", "exact-muon"),
        )
        self.case = case
        self.num_batches = 0
        self.is_configured = False
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch)
        if self.case.fault and self.num_batches == self.case.fault.batch_idx:
            is_whole_file = isinstance(self.case.strategy, cases.DDP)
            faults.commit(self.case.fault.kind, is_whole_file=is_whole_file)
        self.num_batches += 1
        return loss * float("inf") if self.num_batches == self.case.overflow_step else loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.losses.append(float(self(batch)))

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        path = self.case.saves_in_validation
        if path and self.trainer.global_step == self.case.num_steps:
            self.trainer.save_checkpoint(path)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.losses.append(float(self(batch)))

    @override
    def configure_model(self) -> None:
        strategy = self.case.strategy
        if self.is_configured or not isinstance(strategy, cases.FSDP2):
            return
        self.is_configured = True
        assert self.device_mesh is not None
        if strategy.tensor_parallel != 1:
            strategies.split_matrices(self, self.device_mesh["tensor_parallel"])
        if self.case.compile_model:  # the Trainer takes no compiled module with this strategy
            for block in self.blocks:
                block.compile(backend="eager")
        mesh = self.device_mesh["data_parallel"]
        strategies.shard(self, mesh, strategy.reshard_after_forward)

    @override
    def configure_optimizers(self) -> Optimizer:
        module = self.trainer.model or self
        params = [p for p in module.parameters() if p.requires_grad]
        return make_optimizer(self.case, in_groups(self.case, params))


def in_groups(case: cases.TrainerRun, params: list[torch.nn.Parameter]) -> ParamsT:
    if case.vector_step_size is None:
        return params
    matrices, vectors = ([p for p in params if (p.ndim == 2) is is_2d] for is_2d in (True, False))
    own: dict[str, Any] = {"params": vectors, "lookahead_step_size": case.vector_step_size}
    return [{"params": matrices}, own]


def make_optimizer(case: cases.TrainerRun, params: ParamsT) -> Optimizer:
    if case.optimizer == "adamw":
        # A foreach kernel takes the tensors of one mesh only.
        is_split = isinstance(case.strategy, cases.FSDP2) and case.strategy.tensor_parallel != 1
        return torch.optim.AdamW(params, lr=1e-2, foreach=False if is_split else None)
    if case.optimizer == "fused":
        return torch.optim.AdamW(params, lr=1e-2, fused=True)
    if case.optimizer == "sgd":
        return torch.optim.SGD(params, lr=5e-2)
    if case.optimizer == "momentum":
        return torch.optim.SGD(params, lr=2e-2, momentum=0.9)
    return torch.optim.Muon(params, lr=1e-2)


def run(case: cases.TrainerRun) -> dict[str, Any]:
    """Train; return what the tests compare."""
    module, callbacks, logger = Module(case), make_callbacks(case), KeepsMetrics()
    collectives: dict[str, int] = {}
    kernel_calls: list[int] = []
    trainer = make_case_trainer(case, callbacks, logger)
    with (
        counted_collectives(collectives, is_on=case.observe == "collectives"),
        counted_kernel_calls(kernel_calls),
        muon.exact_products(is_on=case.optimizer == "exact-muon"),
        strategies.without_reshard(is_on=case.never_reshard),
        small_kernels(),
    ):
        if not (case.then_evaluates and case.load):
            fit(trainer, module, case)
        if case.then_evaluates:
            evaluate(trainer, module, case)
    if case.save:
        trainer.save_checkpoint(case.save)
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    group = groups[0] if groups else {}
    return {
        "tensors": gather(trainer, module),
        "group": {key: group[key] for key in group if key.startswith("ema_nesterov")},
        "collectives": collectives,
        "moves": [n for c in callbacks if isinstance(c, CountsMoves) for n in c.counts],
        "kernel_calls": kernel_calls,
        "metrics": logger.metrics,
        "steps": [(c.before, c.after) for c in callbacks if isinstance(c, RecordsSteps)],
        "losses": module.losses,
        "evaluations": [(c.iterates, c.seen) for c in callbacks if isinstance(c, SeesEvaluations)],
    }


def make_case_trainer(
    case: cases.TrainerRun, callbacks: list[Callback], logger: KeepsMetrics
) -> Trainer:
    plugins = strategies.plugins_for(case)
    num_validations = 1.0 if case.val_check_interval is None else case.val_check_interval
    return make_trainer(
        callbacks,
        logger=logger if case.logs else False,
        log_every_n_steps=1,
        enable_checkpointing=case.checkpoints is not None,
        max_epochs=case.num_steps // 2,
        accelerator=case.accelerator,
        strategy=strategies.for_trainer(case.strategy, case.accelerator),
        devices=strategies.local_world_size(),
        num_nodes=world_size() // strategies.local_world_size(),
        accumulate_grad_batches=case.accumulate,
        precision=None if plugins else case.precision,
        plugins=plugins,
        val_check_interval=num_validations,
        use_distributed_sampler=False,
    )


def fit(trainer: Trainer, module: Module, case: cases.TrainerRun) -> None:
    validation = None if case.val_check_interval is None else evaluated(case)
    size = strategies.tensor_parallel_size(case.strategy)
    tokens = Tokens(2 * case.accumulate, rank() // size, world_size() // size)
    fitted: LightningModule = module
    if case.compile_model and not isinstance(case.strategy, cases.FSDP2):
        fitted = cast(LightningModule, torch.compile(module, backend="eager"))
    trainer.fit(fitted, DataLoader(tokens, batch_size=None), validation, ckpt_path=case.load)


def evaluate(trainer: Trainer, module: Module, case: cases.TrainerRun) -> None:
    """Validate twice and test, so that each begins where the former one has left the shards."""
    for entry in (trainer.validate, trainer.validate, trainer.test):
        entry(module, evaluated(case), ckpt_path=case.load, verbose=False)


def evaluated(case: cases.TrainerRun) -> DataLoader[Tensor]:
    size = strategies.tensor_parallel_size(case.strategy)
    return DataLoader(Tokens(1, rank() // size, world_size() // size), batch_size=None)


class SeesEvaluations(Callback):
    """Whole iterates after each step, and whole parameters behind each evaluation.

    Behind it, since to gather parameters drops those that FSDP has gathered already.
    """

    def __init__(self) -> None:
        self.iterates: list[dict[str, Tensor]] = []
        self.seen: list[tuple[int, dict[str, Tensor]]] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.iterates.append(gather_weights(trainer, cast(Module, pl_module)))

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == len(self.iterates):
            self.iterates.append(gather_weights(trainer, cast(Module, pl_module)))

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        weights = gather_weights(trainer, cast(Module, pl_module))
        self.seen.append((trainer.global_step, weights))

    on_test_batch_end = on_validation_batch_end


@contextmanager
def small_kernels() -> Iterator[None]:
    """Have the compiled kernel and the compressed forms work on a small model too."""
    with (
        replaced(ema_joined, "_MIN_ELEMENTS", 1),
        replaced(codecs, "_MIN_ELEMENTS", 1),
        replaced(codecs, "BLOCK_SIZE", 4),
    ):
        yield


def make_callbacks(case: cases.TrainerRun) -> list[Callback]:
    """The method in the form that a test asks for, and what observes or saves beside it."""
    callbacks = make_rule(case.rule)
    if case.observe == "moves":
        callbacks.append(CountsMoves())
    if case.observe == "steps":
        callbacks.append(RecordsSteps())
    if case.observe == "evaluations":
        callbacks.append(SeesEvaluations())
    if case.checkpoints:
        callbacks.append(
            ModelCheckpoint(
                case.checkpoints.folder,
                case.checkpoints.file_name,
                save_top_k=-1 if case.checkpoints.file_name == "{step}" else 1,
                save_on_exception=case.fault is not None and case.fault.kind == "terminate",
            )
        )
        if case.checkpoints.in_place:
            callbacks.append(SavesInPlace())
    if case.strategy == cases.FSDP1(checkpoint="full-unchecked"):
        callbacks.append(SavesWholeFile())
    return callbacks


def make_rule(rule: cases.Rule) -> list[Callback]:
    if rule is None:
        return []
    if rule == "gpa":
        return [GPA(0.7, 0.9)]
    if rule == "snoo":
        return [SNOO(3, 0.8, 0.5)]
    callback = EMANesterov(
        0.5,
        0.9,
        warmup=1,
        rest=rule.rest,
        total_steps=rule.total_steps,
        compile=rule.compile,
        direction_dtype=rule.direction_dtype,
        evaluate_at=rule.evaluate_at,
    )
    return [callback]


def gather(trainer: Trainer, module: Module) -> dict[str, Tensor]:
    """Whole parameters, base state and directions by name, on every process."""
    out = {f"weight.{name}": w for name, w in gather_weights(trainer, module).items()}
    for name, state in gather_states(trainer, module).items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                out[f"{key}.{name}"] = full(value).clone().cpu()
    return dict(sorted(out.items()))


def gather_weights(trainer: Trainer, module: Module) -> dict[str, Tensor]:
    """Whole parameters by name, on every process."""
    root = trainer.strategy.model
    assert root is not None
    Sharding(root, torch.optim.SGD([torch.zeros(1)])).drop_copies()
    if isinstance(module.case.strategy, cases.FSDP1):
        with strategies.full_state_dict_context(root):
            return {name: value.clone().cpu() for name, value in root.state_dict().items()}
    return {name: full(p.detach()).clone().cpu() for name, p in module.named_parameters()}


def gather_states(trainer: Trainer, module: Module) -> dict[str, Any]:
    """The optimizer's states by the names of their parameters; none where nothing was trained."""
    states: dict[str, Any] = {}
    for optimizer in trainer.optimizers:
        if isinstance(module.case.strategy, cases.FSDP1):
            root = trainer.strategy.model
            assert root is not None
            with strategies.full_state_dict_context(root):
                states |= FullyShardedDataParallel.optim_state_dict(root, optimizer)["state"]
        else:
            names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
            states |= {names[p]: s for p, s in optimizer.state.items()}
    return states


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
