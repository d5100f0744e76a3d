"""Runs of the Trainer on two and four processes follow the same path as on one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.cases import (
    DDP,
    EMA,
    FSDP2,
    BaseOptimizer,
    TrainerRun,
    stopped_and_resumed,
)
from tests.distributed.observers import check_step
from tests.distributed.oracle import oracle
from tests.distributed.processes import Results, difference, launch
from tests.distributed.runs import BASES, FORMATS, STRATEGIES, TRAINED

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize(("name", "accumulate"), [("adamw", 1), ("accumulated", 2)])
def test_one_process_equals_the_reference(name: str, accumulate: int, one_process: Results) -> None:
    """What the runs on several processes are compared with, in float64 and without our code."""
    expected = oracle(accumulate)
    assert difference(one_process[name], expected) < 1e-5  # float32 rounding
    assert difference(one_process["plain"], expected, "weight") > 1e-2


@pytest.fixture(scope="module")
def trained(folder: Path) -> Results:
    """Each strategy with a validation in every epoch, and with one inside accumulation windows."""
    runs = [
        variant
        for run in TRAINED.values()
        for variant in (
            replace(run, val_check_interval=1.0, observe="moves", logs=True),
            replace(run, name=f"{run.name}-accumulated", val_check_interval=3, accumulate=2),
        )
    ]
    return launch(folder, 2, runs)


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_equal_one(name: str, one_process: Results, trained: Results) -> None:
    # float32 rounding of the sums over two halves of the batch, after 8 steps of AdamW.
    assert difference(trained[name], one_process["adamw"]) < 1e-5
    accumulated = trained[f"{name}-accumulated"]
    assert difference(accumulated, one_process["accumulated"]) < 1e-5
    assert difference(one_process["adamw"], one_process["plain"], "weight") > 1e-2


@pytest.mark.parametrize("name", TRAINED)
def test_moves_do_not_communicate(name: str, trained: Results) -> None:
    """Also those around a validation. The rest of a step is counted below."""
    counts = trained[name]["moves"]
    assert len(counts) > 12
    assert set(counts) == {0}


@pytest.mark.parametrize("name", sorted(set(TRAINED) - {"ddp", "fsdp1", "fsdp2"}))
def test_training_has_the_collectives_of_the_base_optimizer_alone(
    name: str, tmp_path: Path
) -> None:
    """The other strategies are in ``test_promises.py``."""
    ours = replace(TRAINED[name], num_steps=2, observe="collectives")
    results = launch(tmp_path, 2, [ours, replace(ours, name="plain", rule=None)])
    assert sum(results["plain"]["collectives"].values()) > 10
    assert results[name]["collectives"] == results["plain"]["collectives"]


@pytest.mark.parametrize("name", TRAINED)
def test_logged_norms_are_those_of_the_whole_model(
    name: str, one_process: Results, trained: Results
) -> None:
    expected = one_process["measured"]["metrics"]
    assert len(trained[name]["metrics"]) == len(expected) == 8
    for found, whole in zip(trained[name]["metrics"], expected, strict=True):
        assert found == pytest.approx(whole, rel=1e-3, abs=1e-6)
    assert expected[-1]["ema_nesterov/alignment"] > 0.1


def test_logged_step_size_is_zero_in_the_last_part_of_the_run(one_process: Results) -> None:
    sizes = [metrics["ema_nesterov/step_size"] for metrics in one_process["resting"]["metrics"]]
    assert sizes == [0.0, *[0.5] * 6, 0.0]


@pytest.mark.parametrize("name", ["fsdp1", "fsdp1-grad-op", "fsdp2", "fsdp2-no-reshard"])
def test_without_resharding_the_run_differs(
    name: str, tmp_path: Path, one_process: Results
) -> None:
    """The trap is real: a validation leaves gathered parameters that the next step would use."""
    run = replace(TRAINED[name], val_check_interval=1.0, never_reshard=True)
    result = launch(tmp_path, 2, [run])[name]
    assert difference(result, one_process["adamw"], "weight") > 1e-3


def test_data_beside_tensor_parallelism_on_four_processes(
    tmp_path: Path, one_process: Results
) -> None:
    run = TrainerRun(name="four", strategy=FSDP2(tensor_parallel=2))
    validated = replace(run, name="validated", val_check_interval=1.0, logs=True)
    results = launch(tmp_path, 4, [*stopped_and_resumed(tmp_path, [run]), validated])
    assert difference(results["validated"], one_process["adamw"]) < 1e-5
    assert difference(results["four-resumed"], results["four"]) == 0.0
    assert difference(results["four-saved"], results["four"], "weight") > 1e-3
    pairs = zip(results["validated"]["metrics"], one_process["measured"]["metrics"], strict=True)
    for found, whole in pairs:
        assert found == pytest.approx(whole, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("base", [base for base in BASES if base != "adamw"])
@pytest.mark.parametrize("name", FORMATS)
def test_other_base_optimizers_on_two_processes_equal_one(
    name: str, base: BaseOptimizer, tmp_path: Path, one_process: Results
) -> None:
    run = TrainerRun(name="two", strategy=FORMATS[name], optimizer=base)
    result = launch(tmp_path, 2, [run])["two"]
    assert difference(result, one_process[base]) < 1e-5  # float32 rounding
    assert difference(one_process["plain"], one_process[base], "weight") > 1e-2


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_muon_on_two_processes_equals_one(name: str, tmp_path: Path, one_process: Results) -> None:
    """With products in float64: in bfloat16 the halves of a batch round otherwise on every CPU."""
    run = TrainerRun(
        name="muon",
        strategy=STRATEGIES[name],
        optimizer="exact-muon",
        model_dtype="float64",
        val_check_interval=1.0,
    )
    result = launch(tmp_path, 2, [run])["muon"]
    # float64 rounding of the sums over two halves of the batch; Muon amplifies it some 500 times.
    assert difference(result, one_process["muon"]) < 1e-11
    assert difference(one_process["muon"], one_process["muon-plain"], "weight") > 1e-2


KERNELS = ("ddp", "fsdp1", "fsdp1-flat", "fsdp2")


@pytest.fixture(scope="module")
def with_kernel(folder: Path) -> Results:
    """The kernel is compiled once, so all are run by the same processes."""
    rule = EMA(compile=True)
    runs = [replace(TRAINED[name], rule=rule, val_check_interval=1.0) for name in KERNELS]
    return launch(folder, 2, runs)


@pytest.mark.parametrize("name", KERNELS)
def test_compiled_kernel_works_on_shards(
    name: str, with_kernel: Results, one_process: Results
) -> None:
    assert difference(with_kernel[name], one_process["adamw"]) < 1e-5
    assert len(with_kernel[name]["kernel_calls"]) >= 6  # steps with lookahead
    assert one_process["adamw"]["kernel_calls"] == []


OVERFLOWS = [
    TrainerRun(
        name=f"{name}-{base}-16-mixed",
        strategy=STRATEGIES[name],
        optimizer=base,
        precision="16-mixed",
        overflow_step=5,
    )
    for name in ("ddp", "fsdp1")
    for base in ("adamw", "fused")
]
STEPS = {
    run.name: replace(run, observe="steps")
    for run in (
        *OVERFLOWS,
        *(
            TrainerRun(name=f"{name}-bf16-mixed", strategy=STRATEGIES[name], precision="bf16-mixed")
            for name in ("ddp", "fsdp1", "fsdp2")
        ),
        TrainerRun(name="ddp-muon", strategy=DDP(), optimizer="muon"),
        TrainerRun(name="fsdp2-muon", strategy=FSDP2(), optimizer="muon"),
    )
}


@pytest.mark.parametrize("name", STEPS)
def test_every_step_follows_the_equations_also_those_that_the_scaler_skips(
    name: str, tmp_path: Path
) -> None:
    """What each of two processes holds, step by step, where numbers leave float32."""
    results = launch(tmp_path, 2, [STEPS[name]])
    for rank in (0, 1):
        [(points, held)] = results.of_process(name, rank)["steps"]
        assert len(points) == len(held) == 8
        for idx in range(1, 8):
            is_skipped = idx + 1 == STEPS[name].overflow_step
            check_step(points[idx], held[idx - 1], held[idx], is_skipped=is_skipped)
