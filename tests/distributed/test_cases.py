"""A misspelt option is refused, and a run that fails is named and hides no other."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import DDP, EMA, FSDP1, Fault, TrainerRun
from tests.distributed.processes import launch

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (TrainerRun, {"accumulates": 2}, TypeError, "accumulates"),
        (DDP, {"use_orig_params": False}, TypeError, "use_orig_params"),
        (FSDP1, {"sharding": "SHARD_GRAD"}, ValueError, "'SHARD_GRAD_OP', .*, got 'SHARD_GRAD'"),
        (TrainerRun, {"optimizer": "adam"}, ValueError, "optimizer must be one of 'adamw'"),
        (EMA, {"direction_dtype": "int4"}, ValueError, "direction_dtype must be one of"),
    ],
)
def test_misspelt_options_are_refused(
    make: type[Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    needed = {"name": "run", "strategy": DDP()} if make is TrainerRun else {}
    make(**needed)
    with pytest.raises(error, match=message):
        make(**needed, **options)


def test_runs_cannot_be_changed_after_they_were_named() -> None:
    run = TrainerRun(name="run", strategy=DDP())
    with pytest.raises(FrozenInstanceError):
        run.num_steps = 4  # type: ignore[misc]  # this is what must fail


def test_runs_that_fail_are_named_and_the_others_have_results(tmp_path: Path) -> None:
    """One raises on one process, one ends a process without a word, one is as it should be."""
    runs = [
        TrainerRun(name="raises", strategy=DDP(), fault=Fault("raise", 3)),
        TrainerRun(name="dies", strategy=DDP(), fault=Fault("kill", 3)),
        TrainerRun(name="works", strategy=DDP()),
    ]
    results = launch(tmp_path, 2, runs)
    assert list(results) == ["raises", "dies", "works"]
    with pytest.raises(AssertionError, match="'raises' failed on 2 processes") as raised:
        results["raises"]
    assert "Process 1: Traceback" in str(raised.value)
    assert "ZeroDivisionError: on purpose" in str(raised.value)
    with pytest.raises(AssertionError, match=r"'dies' failed on 2 processes.*, -9\]"):
        results["dies"]
    assert results["works"]["tensors"]
