"""Fixtures that every folder of tests can ask for."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.toys import Toy, adamw, trajectory_of

# The models are tiny: threads of several processes would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Every test starts from the same seed, alone or after others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_cover_in_new_processes(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pytest-cov heeds its mark in this process; those that it starts ask the environment."""
    if request.node.get_closest_marker("no_cover"):
        monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


@pytest.fixture(autouse=True)
def _same_global_hooks() -> Iterator[None]:
    """LitGPT's optimizer looks for its model with a hook of every module, until it is found."""
    hooks = nn.modules.module._global_forward_pre_hooks
    before = set(hooks)
    yield
    for key in set(hooks) - before:
        del hooks[key]


@pytest.fixture(autouse=True)
def _messages_reach_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's loggers hand their messages on to pytest, whoever imported Lightning first.

    They do not where the root logger had no handler at the import.
    """
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)


@pytest.fixture
def exact_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.optim.Muon`` computes in the dtype of its parameters instead of in bfloat16.

    CPUs round bfloat16 products in different ways, and the iteration amplifies small singular
    values by up to 3.4445 ** 5, about 500: two runs could not be compared with one tolerance.
    """
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self)


@pytest.fixture(scope="session")
def steps_of_four_batches() -> list[list[Tensor]]:
    """The oracle's iterates x_0 ... x_6 of the toy with AdamW, four micro-batches each step."""
    return trajectory_of(Toy(adamw), accumulate=4, num_steps=6)


@pytest.fixture(scope="session")
def steps_of_one_batch() -> list[list[Tensor]]:
    """The oracle's iterates x_0 ... x_6 of the toy with AdamW, one batch each step."""
    return trajectory_of(Toy(adamw), num_steps=6)
