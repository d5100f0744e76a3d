"""A loop in the manner of torchtitan follows the reference, and resumes from its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from tests.other_trainers import processes
from tests.other_trainers.problem import STEP_SIZE, check, oracle
from tests.other_trainers.sharded_loop import NUM_STEPS, REST, WARMUP, lr_factor

RUN: dict[str, Any] = {
    "step_size": lambda t: STEP_SIZE * lr_factor(t) if WARMUP <= t < NUM_STEPS - REST else 0.0,
    "make_scheduler": lambda optimizer: LambdaLR(optimizer, lr_factor),
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("form", ["nested", "flat"])
def test_sharded_loop_matches_the_reference_and_resumes(form: str, tmp_path: Path) -> None:
    """Also where set_state_dict takes only what stands in the optimizer's own groups."""
    result = processes.run("sharded_loop", tmp_path / "run", form)
    check(result["params"], NUM_STEPS, **RUN)
    torch.testing.assert_close(result["half"], oracle(4, **RUN)[-1], rtol=1e-10, atol=1e-12)
    pairs = zip(result["params"], result["resumed"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert result["num_steps"] == NUM_STEPS
