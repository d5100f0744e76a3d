"""What older torch and Lightning lack: a test that needs it is skipped, and says why."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["EMAWeightAveraging", "is_older_lightning", "muon", "needs_fsdp2_on_cpu"]

try:
    from lightning.pytorch.callbacks import EMAWeightAveraging
except ImportError:

    class EMAWeightAveraging(Callback):  # type: ignore[no-redef]  # in its place
        """Skips the test that makes one."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pytest.skip("this Lightning has no EMAWeightAveraging, which came with 2.6")


def is_older_lightning() -> bool:
    """Return whether Lightning is older than 2.6, whose faults no test may take for ours."""
    major, minor = lightning.__version__.split(".")[:2]
    return (int(major), int(minor)) < (2, 6)


needs_fsdp2_on_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch needs a GPU"
)
"""For tests that train with it in one process."""


def muon(params: Iterable[Tensor]) -> Optimizer:
    """Return torch's Muon; skip the test that asks for it where there is none."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon, which came with 2.9")
    return torch.optim.Muon(params, lr=1e-3)
