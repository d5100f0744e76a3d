"""Sharded training with NCCL follows the path of one process, on one GPU and on two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
import torch

from tests.distributed.cases import (
    DDP,
    EMA,
    FSDP1,
    FSDP2,
    Strategy,
    TrainerRun,
    stopped_and_resumed,
)
from tests.distributed.observers import check_step
from tests.distributed.oracle import oracle
from tests.distributed.processes import Results, difference, launch

pytestmark = pytest.mark.distributed


class World(NamedTuple):
    """Where the processes are, and how many."""

    accelerator: Literal["cpu", "gpu"]
    num_processes: int


def _needs(num_gpus: int) -> list[pytest.MarkDecorator]:
    is_there = torch.cuda.is_available() and torch.cuda.device_count() >= num_gpus
    return [pytest.mark.gpu, pytest.mark.skipif(not is_there, reason=f"It takes {num_gpus} GPUs.")]


WORLDS = [
    pytest.param(World("cpu", 1), id="cpu-1", marks=pytest.mark.slow),
    pytest.param(World("gpu", 1), id="gpu-1", marks=_needs(1)),
    pytest.param(World("gpu", 2), id="gpu-2", marks=_needs(2)),
]
STRATEGIES: dict[str, Strategy] = {
    "ddp": DDP(),
    # One process is not sharded by FSDP (1), which then saves whole tensors only.
    "fsdp1": FSDP1(checkpoint="full-unchecked"),
    "fsdp2": FSDP2(),
    "fsdp2-no-reshard": FSDP2(reshard_after_forward=False),
}


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest) -> World:
    found = request.param
    assert isinstance(found, World)
    return found


@pytest.fixture(scope="module")
def results(world: World, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Each strategy as a whole and interrupted, compiled, and with numbers that leave float32."""
    folder: Path = tmp_path_factory.mktemp("sharded")
    runs: list[TrainerRun] = []
    for name, strategy in STRATEGIES.items():
        run = TrainerRun(
            name=name,
            strategy=strategy,
            accelerator=world.accelerator,
            val_check_interval=1.0,
        )
        runs += stopped_and_resumed(folder, [run])
        runs.append(replace(run, name=f"{name}-kernel", rule=EMA(compile=True)))
        runs.append(replace(run, name=f"{name}-bf16", precision="bf16-mixed", observe="steps"))
    for optimizer in ("adamw", "fused"):
        scaled = TrainerRun(
            name=f"ddp-16-{optimizer}",
            strategy=DDP(),
            accelerator=world.accelerator,
            optimizer=optimizer,
            precision="16-mixed",
            overflow_step=5,
            observe="steps",
        )
        runs.append(scaled)
    runs.append(replace(runs[0], name="plain", rule=None))
    return launch(folder, world.num_processes, runs)


@pytest.mark.parametrize("name", STRATEGIES)
def test_training_matches_the_reference_with_and_without_the_kernel(
    name: str, results: Results
) -> None:
    expected = oracle()
    # float32 rounding, after 8 steps of AdamW.
    assert difference(results[name], expected) < 1e-5
    assert difference(results[f"{name}-kernel"], expected) < 1e-5
    assert len(results[f"{name}-kernel"]["kernel_calls"]) >= 6  # steps with lookahead
    assert difference(results["plain"], expected, "weight") > 1e-2


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_that_was_interrupted_ends_as_if_never_stopped(name: str, results: Results) -> None:
    # Bitwise where the kernels of torch and NCCL are; some on a GPU add up in any order.
    assert difference(results[f"{name}-resumed"], results[name]) < 1e-6
    assert difference(results[f"{name}-saved"], results[name], "weight") > 1e-3


@pytest.mark.parametrize("name", [*(f"{name}-bf16" for name in STRATEGIES), "ddp-16-adamw",
                                  "ddp-16-fused"])  # fmt: skip
def test_every_step_follows_the_equations(name: str, results: Results) -> None:
    for rank in range(results.num_processes):
        [(points, held)] = results.of_process(name, rank)["steps"]
        assert len(points) == len(held) == 8
        for idx in range(1, 8):
            is_skipped = "-16-" in name and idx == 4
            check_step(points[idx], held[idx - 1], held[idx], is_skipped=is_skipped)
