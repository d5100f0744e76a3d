"""What one run of a distributed test does.

Everything is typed and frozen: a misspelt option is an error, and not a test of the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

import torch

DType: TypeAlias = Literal["float32", "float64", "bfloat16"]
BaseOptimizer: TypeAlias = Literal["adamw", "fused", "sgd", "momentum", "muon", "exact-muon"]
FaultKind: TypeAlias = Literal[
    "kill", "raise", "terminate", "kill-in-write", "full-disk", "kill-before-last-file"
]


@dataclass(frozen=True)
class Checked:
    """Refuses, also where mypy does not look, what a ``Literal`` does not list."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(hint)
            if get_origin(hint) is Literal and value not in choices:
                listed = ", ".join(map(repr, choices))
                raise ValueError(f"{name} must be one of {listed}, got {value!r}.")


@dataclass(frozen=True)
class OneProcess(Checked):
    """No process group: what the others are compared with."""


@dataclass(frozen=True)
class DDP(Checked):
    """Every process holds all parameters."""


@dataclass(frozen=True, kw_only=True)
class FSDP1(Checked):
    """FullyShardedDataParallel around each block and the model.

    Attributes:
        checkpoint: ``"full"`` is refused on a CPU; ``"full-unchecked"`` is chosen after the check.
    """

    sharding: Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"] = "FULL_SHARD"
    use_orig_params: bool = True
    checkpoint: Literal["sharded", "full", "full-unchecked"] = "sharded"


@dataclass(frozen=True, kw_only=True)
class FSDP2(Checked):
    """``fully_shard`` on each block and the model; its shards are DTensors.

    Attributes:
        reshard_after_forward: ``None``: all but the root, as torch chooses.
        tensor_parallel: Processes that share the matrices of a block.
        replicas: Groups of processes that hold the same shards; in a loop of one's own only.
        writes_folder: Whether a checkpoint is a folder that each process writes to.
    """

    reshard_after_forward: bool | None = None
    tensor_parallel: int | Literal["all"] = 1
    replicas: int = 1
    writes_folder: bool = True


Strategy: TypeAlias = OneProcess | DDP | FSDP1 | FSDP2


@dataclass(frozen=True, kw_only=True)
class EMA(Checked):
    """EMA-Nesterov with step size 0.5, decay 0.9 and a warmup of one step."""

    total_steps: int = 8
    rest: int = 0
    compile: bool = False
    direction_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    evaluate_at: Literal["iterate", "average"] = "iterate"


Rule: TypeAlias = EMA | Literal["gpa", "snoo"] | None


@dataclass(frozen=True)
class Fault(Checked):
    """What goes wrong in one batch, counted from 0."""

    kind: FaultKind
    batch_idx: int


@dataclass(frozen=True, kw_only=True)
class Checkpoints(Checked):
    """Where ModelCheckpoint saves after every epoch of two steps.

    Attributes:
        file_name: A fixed name has each checkpoint written over the one before.
        in_place: Whether a folder is written over as Lightning does it without the method.
    """

    folder: Path
    file_name: Literal["{step}", "newest"] = "{step}"
    in_place: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainerRun(Checked):
    """A run of the Trainer.

    Attributes:
        name: Names the run among those of one launch, and in the message when it fails.
        rule: The lookahead method; ``None``: the base optimizer alone.
        num_steps: Optimizer steps that this run takes, with those of the checkpoint; even.
        accelerator: As the Trainer has it: NCCL on GPUs, gloo elsewhere.
        accumulate: Batches of a step.
        val_check_interval: As the Trainer has it; ``None``: no validation.
        model_dtype: Of the parameters. Precision 64-true is not offered with every strategy.
        vector_step_size: Of parameters that are no matrices, in a group of their own; ``None``: all
            are in one group.
        has_unused: Whether the model has a parameter that never gets a gradient.
        overflow_step: Counted from 1: the step whose loss is infinite.
        load: Checkpoint to continue.
        save: Where to save after the last step.
        observe: What is noted beside the result.
        saves_in_validation: Where the module saves in the last validation.
        then_evaluates: Whether validation and test follow: of what was trained, or, without a step,
            of the checkpoint to load.
        logs: Whether every step is measured and logged, and the metrics noted.
        never_reshard: Whether FSDP is not told that the shards changed.
        may_fail: Whether an error is the result.
        port: Has the run in a process of its own, and is the port of its process group.
    """

    name: str
    strategy: Strategy
    rule: Rule = EMA()
    optimizer: BaseOptimizer = "adamw"
    num_steps: int = 8
    accelerator: Literal["cpu", "gpu"] = "cpu"
    accumulate: int = 1
    val_check_interval: int | float | None = None
    model_dtype: DType = "float32"
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"] = "32-true"
    compile_model: bool = False
    vector_step_size: float | None = None
    has_unused: bool = False
    overflow_step: int | None = None
    load: Path | None = None
    save: Path | None = None
    observe: Literal["nothing", "moves", "collectives", "steps", "evaluations"] = "nothing"
    saves_in_validation: Path | None = None
    then_evaluates: bool = False
    logs: bool = False
    never_reshard: bool = False
    may_fail: bool = False
    checkpoints: Checkpoints | None = None
    fault: Fault | None = None
    port: int | None = None


@dataclass(frozen=True, kw_only=True)
class AttachedRun(Checked):
    """A loop of one's own, with AdamW; ``attach_ema_nesterov`` where ``is_attached``.

    Attributes:
        uses_fabric: Whether Fabric sets the loop up, in place of torch.
        evaluates: Where in a batch the model is evaluated.
        recomputes: Whether blocks forget their activations until the backward pass.
        evaluate_at: Where they are evaluated.
        notes_evaluations: Whether iterates and the losses of evaluations are noted.
        start: Steps that the run took before.
        load: Checkpoint to load after attaching.
        load_before: Checkpoint to load before it.
        save_in_window: Where to save after the backward pass of the ninth batch.

    The others are those of :class:`TrainerRun`.
    """

    name: str
    strategy: Strategy
    uses_fabric: bool = False
    is_attached: bool = True
    num_steps: int = 8
    accumulate: int = 1
    evaluates: Literal["before the step", "after the step"] = "before the step"
    model_dtype: DType = "float32"
    compile_model: bool = False
    recomputes: bool = False
    evaluate_at: Literal["iterate", "average"] = "iterate"
    notes_evaluations: bool = False
    start: int = 0
    load: Path | None = None
    load_before: Path | None = None
    save: Path | None = None
    save_in_window: Path | None = None
    never_reshard: bool = False
    may_fail: bool = False
    port: None = None


Case: TypeAlias = TrainerRun | AttachedRun
CaseT = TypeVar("CaseT", TrainerRun, AttachedRun)


def named(case: CaseT, suffix: str) -> str:
    return f"{case.name}-{suffix}"


def stopped_and_resumed(
    folder: Path, cases: Sequence[TrainerRun], *, num_steps: int = 4
) -> list[TrainerRun]:
    """Return each run, one that stops and saves (``-saved``), one that goes on (``-resumed``)."""
    runs: list[TrainerRun] = []
    for case in cases:
        path = folder / case.name
        stopped = replace(case, name=named(case, "saved"), num_steps=num_steps, save=path)
        runs += [case, stopped, replace(case, name=named(case, "resumed"), load=path)]
    return runs


def dtype_of(name: DType) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
