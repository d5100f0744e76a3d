"""The promises of a sharded run, once for each kind of strategy, on two CPU processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.distributed.cases import TrainerRun, stopped_and_resumed
from tests.distributed.processes import Results, difference, launch
from tests.distributed.runs import STRATEGIES

pytestmark = pytest.mark.distributed

KINDS = ("ddp", "fsdp1", "fsdp2")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """All runs in one process group: starting it takes longer than they do."""
    runs: list[TrainerRun] = []
    for name in KINDS:
        run = TrainerRun(name=name, strategy=STRATEGIES[name], val_check_interval=1.0)
        ours = replace(
            run,
            name=f"{name}-ours",
            num_steps=2,
            val_check_interval=None,
            observe="collectives",
        )
        runs += [
            *stopped_and_resumed(folder, [run]),
            ours,
            replace(ours, name=f"{name}-base", rule=None),
            replace(ours, name=f"{name}-measured", logs=True),
        ]
    return launch(folder, 2, runs)


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_equal_one_and_resume_bitwise(
    name: str, results: Results, one_process: Results
) -> None:
    # float32 rounding of the sums over two halves of the batch, after 8 steps of AdamW.
    assert difference(results[name], one_process["adamw"]) < 1e-5
    assert difference(one_process["adamw"], one_process["plain"], "weight") > 1e-2
    assert difference(results[f"{name}-resumed"], results[name]) == 0.0
    assert difference(results[f"{name}-saved"], results[name], "weight") > 1e-3
    tensors: dict[str, Tensor] = results[name]["tensors"]
    assert any(key.startswith(DIRECTION_KEY) for key in tensors)


@pytest.mark.parametrize("name", KINDS)
def test_no_step_communicates_but_one_that_is_measured(name: str, results: Results) -> None:
    expected = results[f"{name}-base"]["collectives"]
    assert sum(expected.values()) > 10
    assert results[f"{name}-ours"]["collectives"] == expected
    # The counter sees what the norms of a sharded model need, and DDP has the whole model.
    assert (results[f"{name}-measured"]["collectives"] == expected) is (name == "ddp")
