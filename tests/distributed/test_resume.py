"""Checkpoints of the Trainer continue: as if never stopped, and on other numbers of processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.distributed.cases import (
    DDP,
    EMA,
    FSDP1,
    FSDP2,
    BaseOptimizer,
    OneProcess,
    TrainerRun,
    named,
    stopped_and_resumed,
)
from tests.distributed.oracle import oracle
from tests.distributed.processes import Result, Results, difference, launch
from tests.distributed.runs import BASES, FORMATS, SAVED

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Every base optimizer where the formats differ; where only the schedule of gathering does, one.
RUNS = {
    f"{name}-{base}": TrainerRun(name=f"{name}-{base}", strategy=strategy, optimizer=base)
    for name, strategy in SAVED.items()
    for base in BASES
    if base == "adamw" or name in FORMATS
}


@pytest.fixture(scope="module")
def saved(folder: Path) -> Results:
    """Runs of 8 steps, and runs that save after 4, with the method and without."""
    runs = []
    for run in RUNS.values():
        stopped = replace(run, name=named(run, "saved"), num_steps=4, save=folder / run.name)
        runs += [run, stopped]
        if run.optimizer == "adamw":
            path = folder / f"{run.name}-plain"
            runs.append(replace(stopped, name=named(run, "plain"), rule=None, save=path))
    return launch(folder, 2, runs)


@pytest.fixture(scope="module", params=[1, 2, 3])
def resumed(request: pytest.FixtureRequest, folder: Path, saved: Results) -> Results:
    """What goes on from each checkpoint, and what is loaded where no step follows."""
    runs = []
    for run in RUNS.values():
        again = replace(run, name=named(run, "resumed"), load=folder / run.name)
        runs += [again, replace(again, name=named(run, "loaded"), num_steps=4)]
    for name, strategy in SAVED.items():
        run = TrainerRun(name=f"{name}-enabled", strategy=strategy)
        enabled = replace(run, load=folder / f"{name}-adamw-plain")
        disabled = replace(run, name=f"{name}-disabled", rule=None, load=folder / f"{name}-adamw")
        runs += [enabled, replace(enabled, name=f"{name}-at-once", num_steps=4), disabled]
    return launch(folder, request.param, runs)


@pytest.mark.parametrize("name", RUNS)
def test_resume_on_one_two_and_three_processes(name: str, resumed: Results, saved: Results) -> None:
    loaded, four, whole = resumed[f"{name}-loaded"], saved[f"{name}-saved"], saved[name]
    assert difference(loaded, four) == 0.0  # nothing is dropped
    assert loaded["group"] == four["group"]
    # Bitwise on the same number of processes, else the rounding of the batch's sums.
    tolerance = 0.0 if resumed.num_processes == 2 else 1e-5
    assert difference(resumed[f"{name}-resumed"], whole) <= tolerance
    assert difference(four, whole, "weight") > 1e-3


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.optimizer == "adamw"])
def test_two_processes_equal_one(name: str, saved: Results, one_process: Results) -> None:
    """As the runs of ``test_trajectory.py``, but without a validation."""
    assert difference(saved[name], one_process["adamw"]) < 1e-5


def test_state_is_that_of_the_base_optimizer_and_the_direction(saved: Results) -> None:
    keys = {key.split(".")[0] for key in saved["fsdp2-adamw-saved"]["tensors"]}
    assert keys == {"weight", "exp_avg", "exp_avg_sq", "step", DIRECTION_KEY}


@pytest.fixture(scope="module")
def switched(folder: Path, saved: Results) -> Results:
    """One process that goes on with the method after 4 steps, or without it."""
    enabled = TrainerRun(name="enabled", strategy=OneProcess(), load=folder / "ddp-adamw-plain")
    disabled = replace(enabled, name="disabled", rule=None, load=folder / "ddp-adamw")
    return launch(folder, 1, [enabled, disabled])


@pytest.mark.parametrize("name", SAVED)
def test_method_can_be_switched_on_and_off_at_a_checkpoint(
    name: str, resumed: Results, saved: Results, switched: Results
) -> None:
    enabled = resumed[f"{name}-enabled"]
    assert enabled["group"]["ema_nesterov_step"] == 8  # it goes on where the run is
    assert difference(enabled, switched["enabled"]) < 1e-5
    assert difference(resumed[f"{name}-at-once"], saved[f"{name}-adamw-plain"]) == 0.0
    assert difference(resumed[f"{name}-disabled"], switched["disabled"], "weight") < 1e-5
    for result in (switched["enabled"], switched["disabled"]):
        assert difference(result, saved["ddp-adamw"], "weight") > 1e-3
    assert difference(switched["enabled"], switched["disabled"], "weight") > 1e-3


OTHERS = {
    run.name: run
    for run in (
        TrainerRun(name="muon-ddp", strategy=DDP(), optimizer="muon"),
        TrainerRun(name="muon-fsdp2", strategy=FSDP2(), optimizer="muon"),
        TrainerRun(name="unused-fsdp1", strategy=FSDP1(), optimizer="sgd", has_unused=True),
        TrainerRun(name="unused-fsdp2", strategy=FSDP2(), optimizer="sgd", has_unused=True),
    )
}


@pytest.mark.parametrize("name", OTHERS)
def test_muon_and_unused_parameters_resume_bitwise(name: str, tmp_path: Path) -> None:
    """Muon where parameters keep their shape; and a parameter that never gets a gradient."""
    results = launch(tmp_path, 2, stopped_and_resumed(tmp_path, [OTHERS[name]]))
    check_resume(name, results)
    if OTHERS[name].has_unused:
        assert torch.equal(results[name]["tensors"]["weight.unused"], torch.ones(3, 2))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", ["ddp", "fsdp1-flat", "fsdp2", "fsdp2-full"])
def test_resume_in_low_precision_is_bitwise(name: str, precision: str, tmp_path: Path) -> None:
    run = TrainerRun(
        name=name,
        strategy=FORMATS[name],
        precision="bf16-true" if precision == "bf16-true" else "bf16-mixed",
    )
    results = launch(tmp_path, 2, stopped_and_resumed(tmp_path, [run]))
    check_resume(name, results)
    assert {m.dtype for m in directions(results[f"{name}-saved"])} == {torch.float32}


def check_resume(name: str, results: Results) -> None:
    assert difference(results[f"{name}-resumed"], results[name]) == 0.0
    assert results[f"{name}-resumed"]["group"] == results[name]["group"]
    assert difference(results[f"{name}-saved"], results[name], "weight") > 1e-3


def directions(result: Result) -> list[Tensor]:
    return [t for key, t in result["tensors"].items() if key.startswith(DIRECTION_KEY)]


@pytest.mark.parametrize("base", ["adamw", "sgd"])
@pytest.mark.parametrize("name", FORMATS)
def test_checkpoint_made_in_the_rest_holds_the_direction_and_resumes_bitwise(
    name: str, base: BaseOptimizer, tmp_path: Path
) -> None:
    """The last four of eight steps rest; the checkpoint is of the sixth."""
    resting = TrainerRun(name="run", strategy=FORMATS[name], optimizer=base, rule=EMA(rest=4))
    active = replace(resting, name="active", rule=EMA())
    runs = stopped_and_resumed(tmp_path, [resting], num_steps=6)
    results = launch(tmp_path, 2, [*runs, active])
    check_resume("run", results)
    assert difference(results["run"], results["active"], "weight") > 1e-4
    for stage in ("run", "run-saved", "run-resumed"):
        found = directions(results[stage])
        assert len(found) == len(directions(results["active"]))
        assert all(m.any() for m in found), stage


@pytest.mark.parametrize("name", FORMATS)
def test_run_that_is_made_longer_goes_on_as_if_it_had_always_been_so_long(
    name: str, tmp_path: Path
) -> None:
    """From the checkpoint at the start of its rest: bitwise as the longer run."""
    short = TrainerRun(
        name="short", strategy=FORMATS[name], rule=EMA(rest=4), num_steps=4, save=tmp_path / "four"
    )
    longer = replace(short, name="longer", rule=EMA(rest=4, total_steps=12), num_steps=8, save=None)
    extended = replace(longer, name="extended", load=tmp_path / "four")
    whole = replace(short, name="whole", num_steps=8, save=None)
    results = launch(tmp_path, 2, [short, longer, extended, whole])
    assert difference(results["extended"], results["longer"]) == 0.0
    assert difference(results["whole"], results["longer"], "weight") > 1e-4


@pytest.mark.parametrize("name", FORMATS)
def test_run_that_is_made_longer_in_its_rest_follows_the_equations(
    name: str, tmp_path: Path
) -> None:
    """The direction was updated in two steps that rested, and the next look ahead along it."""
    short = TrainerRun(
        name="short", strategy=FORMATS[name], rule=EMA(rest=4), num_steps=6, save=tmp_path / "six"
    )
    extended = replace(
        short,
        name="extended",
        rule=EMA(rest=4, total_steps=12),
        num_steps=8,
        load=tmp_path / "six",
        save=None,
    )
    result = launch(tmp_path, 2, [short, extended])["extended"]
    assert difference(result, oracle(resting=(4, 5))) < 1e-5  # float32 rounding
    for others in ((), (4, 5, 6, 7)):
        assert difference(result, oracle(resting=others), "weight") > 1e-4


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            TrainerRun(name="bf16", strategy=FSDP1(), precision="bf16-true"),
            "use precision='bf16-mixed' or use_orig_params=False",
        ),
        (
            TrainerRun(name="full", strategy=FSDP1(checkpoint="full")),
            "state_dict_type='sharded'",
        ),
        (
            TrainerRun(name="int8", strategy=FSDP1(), rule=EMA(direction_dtype="int8")),
            "FSDP2 (ModelParallelStrategy), or 'float32'",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, TrainerRun) else "",
)
def test_what_cannot_be_saved_is_refused_before_training(
    run: TrainerRun, message: str, tmp_path: Path
) -> None:
    result = launch(tmp_path, 2, [replace(run, may_fail=True)])[run.name]
    assert message in result["error"]
