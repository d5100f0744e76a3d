"""The neighbouring methods on two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from tests.distributed.cases import DDP, TrainerRun, stopped_and_resumed
from tests.distributed.processes import Results, difference, launch
from tests.distributed.runs import FORMATS

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("peer", ["gpa", "snoo"])
@pytest.mark.parametrize("name", ["ddp", "fsdp1", "fsdp2", "fsdp2-full"])
def test_two_processes_equal_one_and_resume_bitwise(
    name: str, peer: Literal["gpa", "snoo"], tmp_path: Path, one_process: Results
) -> None:
    """With validations between the steps; the outer steps of SNOO are the third and the sixth."""
    run = TrainerRun(name=name, strategy=FORMATS[name], rule=peer, val_check_interval=1.0)
    alone = TrainerRun(name="alone", strategy=DDP(), rule=peer)
    expected = launch(tmp_path, 1, [alone])["alone"]
    results = launch(tmp_path, 2, stopped_and_resumed(tmp_path, [run]))
    assert difference(results[name], expected) < 1e-5  # float32 rounding
    assert difference(results[f"{name}-resumed"], results[name]) == 0.0
    assert difference(results[f"{name}-saved"], results[name], "weight") > 1e-3
    for other in (one_process["plain"], one_process["adamw"]):
        assert difference(results[name], other, "weight") > 1e-3
