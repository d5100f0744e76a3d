"""FSDP2, tensor parallelism, DDP and FSDP1 on two processes, against one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ema_nesterov.optimizers import groups_by_role
from tests.optimizers import shards_worker
from tests.optimizers.tiny import OPTIMIZERS, TinyLM, train
from tests.ports import free_port
from tests.processes import start_processes

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


NUM_PROCESSES = 2
sharded = pytest.mark.parametrize("name", ["scale", "clipped_sgd"])
whole_only = [name for name in OPTIMIZERS if name not in ("scale", "clipped_sgd")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("shards")
    start_processes(shards_worker.main, NUM_PROCESSES, folder, free_port())
    found: dict[str, Any] = torch.load(folder / "results.pt", weights_only=True)
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert {*expected} <= {*found}
    for key, value in expected.items():
        # Sums of squares are added in another order, in float64.
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12, msg=key)


def assert_trained(values: dict[str, Tensor]) -> None:
    start = dict(shards_worker.GatedLM().named_parameters())
    moved = [name for name, p in start.items() if not torch.equal(p, values[name])]
    assert len(moved) == len(start)


@sharded
def test_fsdp2_on_two_processes_is_one_process(results: dict[str, Any], name: str) -> None:
    expected = shards_worker.one_run(name, is_sharded=False)
    assert_trained(expected)
    assert_close(results[f"{name}/fsdp2"], expected)


@sharded
def test_fsdp2_with_the_direction_is_one_process(results: dict[str, Any], name: str) -> None:
    expected = shards_worker.one_run(name, is_sharded=False, with_direction=True)
    assert_close(results[f"{name}/direction"], expected)
    plain = shards_worker.one_run(name, is_sharded=False)
    assert not torch.allclose(plain["up.weight"], expected["up.weight"], rtol=0, atol=1e-6)


@sharded
def test_columns_on_two_processes_are_one_process(results: dict[str, Any], name: str) -> None:
    expected = shards_worker.one_run(name, is_sharded=False)
    assert_close(results[f"{name}/columns"], expected)


@sharded
@pytest.mark.parametrize("kind", ["resumed", "resumed_full"])
def test_resume_of_shards_is_bitwise(results: dict[str, Any], name: str, kind: str) -> None:
    found, expected = results[f"{name}/{kind}"], results[f"{name}/fsdp2"]
    assert {*found} == {*expected}
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_collectives_of_a_step_are_counted(results: dict[str, Any]) -> None:
    # SCALE adds the embedding's columns over the vocabulary, ClippedSGD one number of each tensor.
    assert results["scale/collectives"] == 1
    assert results["clipped_sgd/collectives"] == 1
    # With rows that are spread: SCALE's rows; ClippedSGD's rows of the head, then all tensors.
    assert int(results["scale/columns"]["collectives"]) == 1
    assert int(results["clipped_sgd/columns"]["collectives"]) == 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fsdp1_is_refused_before_the_first_step(results: dict[str, Any], name: str) -> None:
    messages = results[f"{name}/refusals"]
    assert "must hold matrices" in messages["fsdp1"]
    assert "--strategy ddp" in messages["fsdp1"]
    assert "flat parameters of FSDP1" in messages["fsdp1_flat"]


@pytest.mark.parametrize("name", whole_only)
def test_fsdp2_is_refused_where_whole_matrices_are_needed(
    results: dict[str, Any], name: str
) -> None:
    message = results[f"{name}/refusals"]["fsdp2"]
    assert "(role 'hidden') must hold whole matrices for" in message
    assert "--strategy ddp" in message


@sharded
def test_fsdp2_is_accepted_where_it_can_be(results: dict[str, Any], name: str) -> None:
    assert results[f"{name}/refusals"]["fsdp2"] == "accepted"


@pytest.mark.parametrize("name", ["apollo", "galore", "lora_pre", "scale"])
def test_ddp_is_one_process(results: dict[str, Any], name: str) -> None:
    found = results[f"{name}/ddp"]
    assert bool(found["is_same"])
    model = TinyLM(dtype=torch.float64)
    optimizer = OPTIMIZERS[name](groups_by_role(model))
    train(model, optimizer, shards_worker.NUM_STEPS)
    for key, p in model.named_parameters():
        # The mean of two equal gradients is exact.
        torch.testing.assert_close(found[key], p.detach(), rtol=0, atol=1e-12)
