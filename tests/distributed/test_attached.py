"""Loops of one's own on several processes, with Fabric and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.cases import FSDP1, FSDP2, AttachedRun, named
from tests.distributed.processes import Results, difference, launch
from tests.distributed.runs import STRATEGIES

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BY_TORCH = [
    AttachedRun(name=name, strategy=strategy)
    for name, strategy in STRATEGIES.items()
    if name != "tensor-parallel"
]
BY_FABRIC = [
    AttachedRun(name=f"fabric-{name}", strategy=STRATEGIES[name], uses_fabric=True)
    for name in ("ddp", "fsdp1", "fsdp2")
]
ON_FOUR = [
    AttachedRun(name="tensor-parallel", strategy=FSDP2(tensor_parallel=2)),
    AttachedRun(name="fsdp1-hybrid", strategy=FSDP1(sharding="HYBRID_SHARD")),
    AttachedRun(name="fsdp2-hybrid", strategy=FSDP2(replicas=2)),
]


def check(
    results: Results, one_process: Results, *, accumulated: str = "", whole: tuple[str, ...] = ()
) -> None:
    for name in whole:
        assert difference(results[name], one_process["adamw"], "weight") < 1e-5, name
    assert difference(results[accumulated], one_process["accumulated"], "weight") < 1e-5
    assert difference(one_process["adamw"], one_process["plain"], "weight") > 1e-2


@pytest.mark.parametrize("run", [*BY_TORCH, *BY_FABRIC], ids=lambda run: run.name)
def test_two_processes_equal_one(run: AttachedRun, tmp_path: Path, one_process: Results) -> None:
    """Evaluation after every micro-batch; no_sync in the windows where there is one."""
    runs = [
        run,
        replace(run, name="accumulated", accumulate=2),
        replace(run, name="recomputes", recomputes=True),
    ]
    # torch.compile fails for FSDP1 in evaluation while it holds gradients, with or without us.
    if not run.uses_fabric:
        runs.append(replace(run, name="compiled", compile_model=True, evaluates="after the step"))
    results = launch(tmp_path, 2, runs)
    names = tuple(name for name in results if name != "accumulated")
    check(results, one_process, accumulated="accumulated", whole=names)


@pytest.mark.parametrize("run", ON_FOUR, ids=lambda run: run.name)
def test_two_dimensional_meshes(run: AttachedRun, tmp_path: Path, one_process: Results) -> None:
    """Data beside tensor parallelism, and shards that are replicated, on four processes."""
    results = launch(tmp_path, 4, [run, replace(run, name="accumulated", accumulate=2)])
    check(results, one_process, accumulated="accumulated", whole=(run.name,))


@pytest.mark.parametrize("name", ["fsdp1", "fsdp1-grad-op", "fsdp2", "fsdp2-no-reshard"])
def test_without_resharding_the_run_differs(
    name: str, tmp_path: Path, one_process: Results
) -> None:
    run = AttachedRun(name=name, strategy=STRATEGIES[name], never_reshard=True)
    result = launch(tmp_path, 2, [replace(run, evaluates="after the step")])[name]
    assert difference(result, one_process["adamw"], "weight") > 1e-3


# torch.distributed.checkpoint without Fabric, which fails for FSDP (1) alone too, and Fabric.
SAVED = {run.name: run for run in (*BY_TORCH, *BY_FABRIC) if run.name in ("ddp", "fsdp2")} | {
    run.name: run for run in BY_FABRIC
}


@pytest.fixture(scope="module")
def saved(folder: Path) -> Results:
    """Runs of 8 steps, and runs that save after 4: with the method, without, in a window."""
    runs = []
    for run in SAVED.values():
        four = replace(run, num_steps=4)
        # FSDP alone is stale after an evaluation between backward pass and step.
        plain = replace(four, is_attached=False, evaluates="after the step")
        window = replace(run, accumulate=2)
        runs += [
            run,
            replace(four, name=named(run, "four"), save=folder / run.name),
            replace(plain, name=named(run, "plain"), save=folder / f"{run.name}-plain"),
            replace(
                window, name=named(run, "window"), save_in_window=folder / f"{run.name}-window"
            ),
            replace(window, name=named(run, "four-windows"), num_steps=4),
        ]
    return launch(folder, 2, runs)


@pytest.fixture(scope="module", params=[1, 2, 3])
def resumed(request: pytest.FixtureRequest, folder: Path, saved: Results) -> Results:
    """What goes on from each checkpoint."""
    runs = []
    for run in SAVED.values():
        again = replace(run, start=4)
        loaded = replace(again, num_steps=4)
        runs += [
            replace(again, name=named(run, "continued"), load=folder / run.name),
            replace(loaded, name=named(run, "loaded"), load=folder / run.name),
            replace(loaded, name=named(run, "in-window"), load=folder / f"{run.name}-window"),
            replace(again, name=named(run, "enabled"), load_before=folder / f"{run.name}-plain"),
        ]
    return launch(folder, request.param, runs)


@pytest.mark.parametrize("name", SAVED)
def test_checkpoints_continue_on_one_two_and_three_processes(
    name: str, resumed: Results, saved: Results
) -> None:
    # Bitwise on the same number of processes, else the rounding of the batch's sums.
    tolerance = 0.0 if resumed.num_processes == 2 else 1e-5
    assert difference(resumed[f"{name}-continued"], saved[name]) <= tolerance
    assert difference(resumed[f"{name}-loaded"], saved[f"{name}-four"]) == 0.0
    assert difference(saved[f"{name}-four"], saved[name]) > 1e-3
    # In a window x comes back from y, up to one unit in the last place.
    assert difference(resumed[f"{name}-in-window"], saved[f"{name}-four-windows"]) < 1e-6


@pytest.fixture(scope="module")
def enabled_on_one_process(folder: Path, saved: Results) -> Results:
    """Without Fabric any number of processes saves the same entries."""
    run = replace(SAVED["ddp"], name="one", start=4, load_before=folder / "ddp-plain")
    return launch(folder, 1, [run])


@pytest.mark.parametrize("name", SAVED)
def test_method_can_be_switched_on_at_a_checkpoint(
    name: str, resumed: Results, saved: Results, enabled_on_one_process: Results
) -> None:
    enabled = resumed[f"{name}-enabled"]
    assert difference(enabled, enabled_on_one_process["one"], "weight") < 1e-5
    assert difference(enabled, saved[name], "weight") > 1e-3


def test_wide_state_that_fsdp_cannot_save_is_refused_before_training(tmp_path: Path) -> None:
    run = AttachedRun(name="bf16", strategy=FSDP1(), model_dtype="bfloat16", may_fail=True)
    error = launch(tmp_path, 2, [run])["bf16"]["error"]
    assert "use precision='bf16-mixed' or use_orig_params=False" in error
