"""Processes die, raise and run out of disk: no wrong number, and the last checkpoint goes on."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ema_nesterov.rules.ema import DIRECTION_KEY
from tests.distributed.processes import Result, difference, free_port, launch, start, start_nodes

# In the sixth of eight steps, or in the save after it. The one after the fourth step is whole.
STRATEGIES = ("ddp", "fsdp1", "fsdp2")
FAULTS: dict[str, dict[str, Any]] = {
    f"{fault}{over}-{strategy}": {
        "fault": fault,
        "strategy": strategy,
        # A fixed name has each checkpoint written over the one before.
        "checkpoint_name": "newest" if over else "{step}",
    }
    for fault in ("kill", "raise", "terminate", "kill-in-write", "full-disk")
    for over in (("", "-over") if fault in ("kill-in-write", "full-disk") else ("",))
    for strategy in STRATEGIES
}
for _strategy in ("fsdp1", "fsdp2"):
    FAULTS[f"kill-before-last-file-{_strategy}"] = {
        "fault": "kill-before-last-file",
        "strategy": _strategy,
        "checkpoint_name": "newest",
    }
IN_PLACE: dict[str, dict[str, Any]] = {
    f"in-place-{name}": {**options, "in_place": True}
    for name, options in FAULTS.items()
    if options["fault"] == "kill-before-last-file"
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def ended(folder: Path) -> dict[str, list[int]]:
    """The exit codes of two processes in which a fault ends the run.

    Nobody ends the other one: it has to notice, long before the process group's timeout.
    """
    runs = {name: {"fault_batch": 5, **options} for name, options in (FAULTS | IN_PLACE).items()}
    for strategy in STRATEGIES:
        stopped = {"strategy": strategy, "fault": "terminate", "fault_batch": 9, "accumulate": 4}
        runs[f"stopped-{strategy}"] = stopped
    configs = [
        {"name": name, "checkpoints": str(folder / name), "port": free_port(), **options}
        for name, options in runs.items()
    ]
    codes, output = start(folder, 2, configs).wait()
    assert codes == [0, 0], output[-4000:]
    assert "File too large" in output  # what the full disk says here
    assert not list(folder.glob("*.pt"))  # none reached its end
    return {
        name: [int((folder / f"{name}-{rank}.code").read_text()) for rank in (0, 1)]
        for name in runs
    }


@pytest.fixture(scope="module")
def continued(folder: Path, ended: dict[str, list[int]]) -> dict[str, Result]:
    """Runs without a fault, what goes on from each last checkpoint, and what broken ones give."""
    configs: list[dict[str, Any]] = []
    for name, options in (FAULTS | IN_PLACE).items():
        common = {"strategy": options["strategy"], "may_fail": True}
        is_over = options["checkpoint_name"] == "newest"
        path = folder / name / ("newest.ckpt" if is_over else "step=4.ckpt")
        configs.append({"name": f"{name}-continued", "load": str(path), **common})
        broken = folder / name / ("newest.ckpt.incomplete" if is_over else "step=6.ckpt")
        configs.append({"name": f"{name}-broken", "load": str(broken), **common})
    for n in STRATEGIES:
        one, window = {"strategy": n}, {"strategy": n, "accumulate": 4}
        stopped = str(folder / f"stopped-{n}" / "step=2.ckpt")
        cut = str(cut_off(folder / f"kill-{n}" / "step=2.ckpt"))
        configs += [
            {"name": n, **one},
            {"name": f"four-{n}", "num_steps": 4, **one},
            {"name": f"truncated-{n}", "load": cut, "may_fail": True, **one},
            {"name": f"two-{n}", "num_steps": 2, **window},
            {"name": f"at-{n}", "num_steps": 2, "load": stopped, **window},
            {"name": f"window-{n}", **window},
        ]
    return launch(folder, 2, configs)


def cut_off(checkpoint: Path) -> Path:
    """Truncate a whole checkpoint, or one file of it."""
    file = checkpoint / "__1_0.distcp" if checkpoint.is_dir() else checkpoint
    file.write_bytes(file.read_bytes()[:-1000])
    return checkpoint


@pytest.mark.parametrize("name", FAULTS)
def test_last_complete_checkpoint_continues_bitwise(
    name: str, continued: dict[str, Result]
) -> None:
    strategy = FAULTS[name]["strategy"]
    assert difference(continued[f"{name}-continued"], continued[strategy]) == 0.0
    assert difference(continued[f"four-{strategy}"], continued[strategy], "weight") > 1e-3


@pytest.mark.parametrize("name", FAULTS)
def test_processes_end_and_what_they_left_half_written_is_refused(
    name: str, folder: Path, ended: dict[str, list[int]], continued: dict[str, Result]
) -> None:
    fault, strategy = FAULTS[name]["fault"], FAULTS[name]["strategy"]
    if fault == "terminate":  # a clean end, with a checkpoint of the sixth step
        assert ended[name] == [0, 0]
        assert difference(continued[f"{name}-broken"], continued[strategy]) == 0.0
        return
    killed = {"kill": -signal.SIGKILL, "kill-in-write": -signal.SIGXFSZ}
    expected = killed.get(fault, -signal.SIGKILL if "kill" in fault else 1)
    writer = 0 if strategy == "ddp" and fault in ("kill-in-write", "full-disk") else 1
    assert ended[name][0 if fault == "kill-before-last-file" else writer] == expected
    assert all(ended[name])
    left = [path for path in (folder / name).rglob("*") if path.is_dir()]
    if strategy == "ddp" or fault in ("kill", "raise"):
        assert not any("step=6" in path.name or "incomplete" in path.name for path in left)
    else:
        assert any("step=6" in path.name or "incomplete" in path.name for path in left)
        assert "does not point to a valid checkpoint" in continued[f"{name}-broken"]["error"]


@pytest.mark.parametrize("name", IN_PLACE)
def test_writing_in_place_would_leave_numbers_of_two_steps(
    name: str, ended: dict[str, list[int]], continued: dict[str, Result]
) -> None:
    """Why a folder is not written over: what Lightning leaves then loads without an error."""
    whole = continued[IN_PLACE[name]["strategy"]]
    assert difference(continued[f"{name}-continued"], whole, "weight") > 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_processes_that_are_told_to_end_in_a_window_save_the_iterate(
    strategy: str, ended: dict[str, list[int]], continued: dict[str, Result]
) -> None:
    """In the second of four micro-batches of the third step."""
    assert ended[f"stopped-{strategy}"] == [0, 0]
    two, at = continued[f"two-{strategy}"], continued[f"at-{strategy}"]
    for name, tensor in two["tensors"].items():
        # x comes back from y, up to one unit in the last place
        torch.testing.assert_close(at["tensors"][name], tensor, rtol=1e-6, atol=1e-8)
    assert any(key.startswith(DIRECTION_KEY) for key in two["tensors"])
    assert difference(two, continued[f"window-{strategy}"], "weight") > 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_truncated_checkpoint_is_refused(strategy: str, continued: dict[str, Result]) -> None:
    error = continued[f"truncated-{strategy}"]["error"]
    # torch looks for an older format in the file, where the archive is broken.
    assert error.startswith("OSError") if strategy == "ddp" else "corrupt" in error


def test_two_nodes_equal_two_processes_and_end_together(
    folder: Path, continued: dict[str, Result]
) -> None:
    """``torchrun`` on each of two nodes; then the same with a process that dies on one."""
    configs: list[dict[str, Any]] = []
    for strategy in STRATEGIES:
        path = str(folder / f"nodes-{strategy}")
        common = {"strategy": strategy}
        configs.append({"name": f"nodes-{strategy}", "save": path, "num_steps": 4, **common})
        configs.append({"name": f"nodes-{strategy}-continued", "load": path, **common})
    killed = {"name": "nodes-killed", "strategy": "ddp", "fault": "kill", "fault_batch": 3}
    codes, output = start_nodes(folder, 2, [*configs, killed]).wait()
    assert all(codes), output[-4000:]
    assert not (folder / "nodes-killed.pt").exists()
    for strategy in STRATEGIES:
        result = torch.load(folder / f"nodes-{strategy}-continued.pt", weights_only=False)
        assert difference(result, continued[strategy]) == 0.0
        assert difference(result, continued[f"four-{strategy}"], "weight") > 1e-3
