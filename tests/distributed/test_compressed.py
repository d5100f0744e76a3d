"""Directions in bfloat16 and int8 on several processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.distributed.cases import EMA, FSDP2, TrainerRun, named
from tests.distributed.processes import Results, difference, launch
from tests.distributed.runs import FORMATS

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

Stored = Literal["float32", "bfloat16", "int8"]
PAIRS: tuple[tuple[Stored, str], ...] = (
    ("bfloat16", "ddp"),
    ("bfloat16", "fsdp2"),
    ("int8", "ddp"),
    ("int8", "fsdp2"),
    ("int8", "fsdp2-full"),
)
RUNS = {
    f"{stored}-{name}": TrainerRun(
        name=f"{stored}-{name}", strategy=FORMATS[name], rule=EMA(direction_dtype=stored)
    )
    for stored, name in PAIRS
}


@pytest.fixture(scope="module")
def saved(folder: Path) -> Results:
    runs = []
    for run in RUNS.values():
        stopped = replace(run, name=named(run, "saved"), num_steps=4, save=folder / run.name)
        runs += [run, stopped]
    return launch(folder, 2, runs)


@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_compressed_directions_resume_and_reshard(
    name: str, num_processes: int, folder: Path, saved: Results, one_process: Results
) -> None:
    resumed = replace(RUNS[name], name="resumed", load=folder / name)
    loaded = replace(resumed, name="loaded", num_steps=4)
    results = launch(folder, num_processes, [resumed, loaded])
    assert difference(results["loaded"], saved[f"{name}-saved"]) == 0.0  # nothing is dropped
    tensors = results["loaded"]["tensors"]
    found = {t.dtype for key, t in tensors.items() if key.startswith(DIRECTION_KEY)}
    assert (torch.int8 if name.startswith("int8") else torch.bfloat16) in found
    if num_processes == 2:
        assert difference(results["resumed"], saved[name]) == 0.0
    # Noise is drawn by position in a shard. It moves the weights by a part of the lookahead.
    assert difference(results["resumed"], saved[name], "weight") < 1e-3
    assert difference(one_process["plain"], saved[name], "weight") > 1e-2


@pytest.mark.parametrize(
    ("made", "asked"), [("int8", "float32"), ("int8", "bfloat16"), ("bfloat16", "int8")]
)
def test_another_format_in_a_sharded_checkpoint_is_refused(
    made: Stored, asked: Stored, folder: Path, saved: Results
) -> None:
    assert saved[f"{made}-fsdp2-saved"]
    run = TrainerRun(
        name="refused",
        strategy=FSDP2(),
        rule=EMA(direction_dtype=asked),
        load=folder / f"{made}-fsdp2",
        may_fail=True,
    )
    assert "direction_dtype must be" in launch(folder, 2, [run])["refused"]["error"]
