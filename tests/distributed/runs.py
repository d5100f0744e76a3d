"""Runs that several test files start from."""

from __future__ import annotations

from tests.distributed.cases import DDP, FSDP1, FSDP2, BaseOptimizer, Strategy, TrainerRun

BASES: tuple[BaseOptimizer, ...] = ("adamw", "sgd", "momentum")

# Where parameters and what is kept for them can be.
STRATEGIES: dict[str, Strategy] = {
    "ddp": DDP(),
    "fsdp1": FSDP1(),
    "fsdp1-grad-op": FSDP1(sharding="SHARD_GRAD_OP"),
    "fsdp1-flat": FSDP1(use_orig_params=False),
    "fsdp2": FSDP2(),
    "fsdp2-no-reshard": FSDP2(reshard_after_forward=False),
    "tensor-parallel": FSDP2(tensor_parallel="all"),
}
TRAINED = {
    **{name: TrainerRun(name=name, strategy=strategy) for name, strategy in STRATEGIES.items()},
    **{
        f"{name}-compile": TrainerRun(
            name=f"{name}-compile", strategy=STRATEGIES[name], compile_model=True
        )
        for name in ("ddp", "fsdp1", "fsdp2")
    },
}
# The formats of checkpoints.
FORMATS: dict[str, Strategy] = {
    "ddp": DDP(),
    "fsdp1": FSDP1(),
    "fsdp1-flat": FSDP1(use_orig_params=False),
    "fsdp2": FSDP2(),
    "fsdp2-full": FSDP2(writes_folder=False),
}
# Formats, and strategies that differ in when parameters are gathered, or that share matrices.
SAVED: dict[str, Strategy] = {
    **FORMATS,
    "fsdp1-full": FSDP1(checkpoint="full-unchecked"),
    "fsdp1-grad-op": STRATEGIES["fsdp1-grad-op"],
    "fsdp2-no-reshard": STRATEGIES["fsdp2-no-reshard"],
    "tensor-parallel": STRATEGIES["tensor-parallel"],
}
