"""Processes die, raise and run out of disk: no wrong number, and the last checkpoint goes on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.distributed import worker
from tests.distributed.cases import Checkpoints, Fault, FaultKind, Strategy, TrainerRun
from tests.distributed.processes import (
    Result,
    Results,
    difference,
    launch,
    run_nodes,
    start,
    wait,
)
from tests.distributed.runs import STRATEGIES
from tests.ports import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

KINDS: dict[str, Strategy] = {name: STRATEGIES[name] for name in ("ddp", "fsdp1", "fsdp2")}
ANYWHERE = Path()  # replaced by a folder of the run's own


def faulty_runs() -> Iterator[TrainerRun]:
    """In the sixth of eight steps, or in the save after it. The one after the fourth is whole."""
    faults: tuple[FaultKind, ...] = ("kill", "raise", "terminate", "kill-in-write", "full-disk")
    for fault in faults:
        for name, strategy in KINDS.items():
            run = TrainerRun(
                name=f"{fault}-{name}",
                strategy=strategy,
                fault=Fault(fault, 5),
                checkpoints=Checkpoints(folder=ANYWHERE),
            )
            yield run
            if fault in ("kill-in-write", "full-disk"):
                over = Checkpoints(folder=ANYWHERE, file_name="newest")
                yield replace(run, name=f"{fault}-over-{name}", checkpoints=over)
    for name in ("fsdp1", "fsdp2"):
        yield TrainerRun(
            name=f"kill-before-last-file-{name}",
            strategy=KINDS[name],
            fault=Fault("kill-before-last-file", 5),
            checkpoints=Checkpoints(folder=ANYWHERE, file_name="newest"),
        )


FAULTY = {run.name: run for run in faulty_runs()}
IN_PLACE = {
    f"in-place-{run.name}": replace(
        run,
        name=f"in-place-{run.name}",
        checkpoints=Checkpoints(folder=ANYWHERE, file_name="newest", in_place=True),
    )
    for run in FAULTY.values()
    if run.fault and run.fault.kind == "kill-before-last-file"
}
# In the second of four micro-batches of the third step.
STOPPED = {
    f"stopped-{name}": TrainerRun(
        name=f"stopped-{name}",
        strategy=strategy,
        fault=Fault("terminate", 9),
        accumulate=4,
        checkpoints=Checkpoints(folder=ANYWHERE),
    )
    for name, strategy in KINDS.items()
}


@pytest.fixture(scope="module")
def ended(folder: Path) -> dict[str, list[int]]:
    """The exit codes of two processes in which a fault ends the run.

    Nobody ends the other one: it has to notice, long before the process group's timeout.
    """
    runs = []
    for run in (FAULTY | IN_PLACE | STOPPED).values():
        assert run.checkpoints
        checkpoints = replace(run.checkpoints, folder=folder / run.name)
        runs.append(replace(run, checkpoints=checkpoints, port=free_port()))
    codes, output = wait(start(folder, 2, runs))
    assert codes == [0, 0], output[-4000:]
    assert "File too large" in output  # what the full disk says here
    assert not list(folder.glob("*.pt"))  # none reached its end
    return {
        run.name: [int(worker.code_file(folder, run.name, rank).read_text()) for rank in (0, 1)]
        for run in runs
    }


@pytest.fixture(scope="module")
def whole(folder: Path, ended: dict[str, list[int]]) -> Results:
    """Runs without a fault, of 8 and of 4 steps, and of windows of 4 batches."""
    runs = []
    for name, strategy in KINDS.items():
        run = TrainerRun(name=name, strategy=strategy)
        window = replace(run, accumulate=4)
        stopped = folder / f"stopped-{name}" / "step=2.ckpt"
        runs += [
            run,
            replace(run, name=f"four-{name}", num_steps=4),
            replace(window, name=f"window-{name}"),
            replace(window, name=f"two-{name}", num_steps=2),
            replace(window, name=f"at-{name}", num_steps=2, load=stopped),
        ]
    return launch(folder, 2, runs)


@pytest.fixture(scope="module")
def continued(folder: Path, ended: dict[str, list[int]]) -> Results:
    """What goes on from each last checkpoint, and what broken ones give."""
    runs = []
    for run in (FAULTY | IN_PLACE).values():
        assert run.checkpoints
        is_over = run.checkpoints.file_name == "newest"
        last = folder / run.name / ("newest.ckpt" if is_over else "step=4.ckpt")
        broken = folder / run.name / ("newest.ckpt.incomplete" if is_over else "step=6.ckpt")
        again = TrainerRun(name=run.name, strategy=run.strategy, load=last, may_fail=True)
        runs += [again, replace(again, name=f"{run.name}-broken", load=broken)]
    return launch(folder, 2, runs)


def kind_of(run: TrainerRun) -> str:
    return next(name for name, strategy in KINDS.items() if strategy == run.strategy)


@pytest.mark.parametrize("name", FAULTY)
def test_last_complete_checkpoint_continues_bitwise(
    name: str, continued: Results, whole: Results
) -> None:
    kind = kind_of(FAULTY[name])
    assert difference(continued[name], whole[kind]) == 0.0
    assert difference(whole[f"four-{kind}"], whole[kind], "weight") > 1e-3


@pytest.mark.parametrize("name", FAULTY)
def test_processes_end_and_what_they_left_half_written_is_refused(
    name: str, folder: Path, ended: dict[str, list[int]], continued: Results, whole: Results
) -> None:
    run = FAULTY[name]
    assert run.fault
    fault, kind = run.fault.kind, kind_of(run)
    if fault == "terminate":  # a clean end, with a checkpoint of the sixth step
        assert ended[name] == [0, 0]
        assert difference(continued[f"{name}-broken"], whole[kind]) == 0.0
        return
    killed = {
        "kill": -signal.SIGKILL,
        "kill-before-last-file": -signal.SIGKILL,
        "kill-in-write": -signal.SIGXFSZ,
    }
    is_whole_file = kind == "ddp" and fault in ("kill-in-write", "full-disk")
    is_first = is_whole_file or fault == "kill-before-last-file"
    assert ended[name][0 if is_first else 1] == killed.get(fault, 1)
    assert all(ended[name])
    left = [path for path in (folder / name).rglob("*") if path.is_dir()]
    is_left = any("step=6" in path.name or "incomplete" in path.name for path in left)
    assert is_left is (kind != "ddp" and fault not in ("kill", "raise"))
    if is_left:
        assert "does not point to a valid checkpoint" in continued[f"{name}-broken"]["error"]


@pytest.mark.parametrize("name", IN_PLACE)
def test_writing_in_place_would_leave_numbers_of_two_steps(
    name: str, continued: Results, whole: Results
) -> None:
    """Why a folder is not written over: what Lightning leaves then loads without an error."""
    expected = whole[kind_of(IN_PLACE[name])]
    assert difference(continued[name], expected, "weight") > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_processes_that_are_told_to_end_in_a_window_save_the_iterate(
    kind: str, ended: dict[str, list[int]], whole: Results
) -> None:
    assert ended[f"stopped-{kind}"] == [0, 0]
    two, at = whole[f"two-{kind}"], whole[f"at-{kind}"]
    for name, tensor in two["tensors"].items():
        # x comes back from y, up to one unit in the last place
        torch.testing.assert_close(at["tensors"][name], tensor, rtol=1e-6, atol=1e-8)
    assert any(key.startswith(DIRECTION_KEY) for key in two["tensors"])
    assert difference(two, whole[f"window-{kind}"], "weight") > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_checkpoint_is_refused(
    kind: str, folder: Path, continued: Results, tmp_path: Path
) -> None:
    """``continued`` has read the others already, and this one is not among them."""
    checkpoint = folder / f"kill-{kind}" / "step=2.ckpt"
    file = checkpoint / "__1_0.distcp" if checkpoint.is_dir() else checkpoint
    file.write_bytes(file.read_bytes()[:-1000])
    run = TrainerRun(name=kind, strategy=KINDS[kind], load=checkpoint, may_fail=True)
    error = launch(tmp_path, 2, [run])[kind]["error"]
    # torch looks for an older format in the file, where the archive is broken.
    assert error.startswith("OSError") if kind == "ddp" else "corrupt" in error


def test_two_nodes_equal_two_processes_and_end_together(tmp_path: Path, whole: Results) -> None:
    """``torchrun`` on each of two nodes; then the same with a process that dies on one."""
    runs = []
    for kind, strategy in KINDS.items():
        run = TrainerRun(name=kind, strategy=strategy, num_steps=4, save=tmp_path / kind)
        runs += [
            run,
            TrainerRun(name=f"{kind}-continued", strategy=strategy, load=tmp_path / kind),
        ]
    killed = TrainerRun(name="killed", strategy=KINDS["ddp"], fault=Fault("kill", 3))
    codes, output = run_nodes(tmp_path, 2, [*runs, killed])
    assert all(codes), output[-4000:]
    assert not worker.result_file(tmp_path, "killed", 0).exists()
    for kind in KINDS:
        file = worker.result_file(tmp_path, f"{kind}-continued", 0)
        result: Result = torch.load(file, weights_only=False)
        assert difference(result, whole[kind]) == 0.0
        assert difference(result, whole[f"four-{kind}"], "weight") > 1e-3
