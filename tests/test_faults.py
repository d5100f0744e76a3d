"""Processes die, raise and run out of disk: no wrong number, and the last checkpoint goes on."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from processes import Result, difference, free_port, launch, start

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
    configs = [
        {
            "name": name,
            "fault_batch": 5,
            "checkpoints": str(folder / name),
            "port": free_port(),
            **options,
        }
        for name, options in (FAULTS | IN_PLACE).items()
    ]
    codes, output = start(folder, 2, configs).wait()
    assert codes == [0, 0], output[-4000:]
    assert "File too large" in output  # what the full disk says here
    return {
        name: [int((folder / f"{name}-{rank}.code").read_text()) for rank in (0, 1)]
        for name in FAULTS | IN_PLACE
    }


@pytest.fixture(scope="module")
def continued(folder: Path, ended: dict[str, list[int]]) -> dict[str, Result]:
    """Runs without a fault, what goes on from each last checkpoint, and what broken ones give."""
    configs: list[dict[str, Any]] = [{"name": n, "strategy": n} for n in STRATEGIES]
    configs += [{"name": f"four-{n}", "strategy": n, "num_steps": 4} for n in STRATEGIES]
    for name, options in (FAULTS | IN_PLACE).items():
        common = {"strategy": options["strategy"], "may_fail": True}
        is_over = options["checkpoint_name"] == "newest"
        path = folder / name / ("newest.ckpt" if is_over else "step=4.ckpt")
        configs.append({"name": f"{name}-continued", "load": str(path), **common})
        broken = folder / name / ("newest.ckpt.incomplete" if is_over else "step=6.ckpt")
        configs.append({"name": f"{name}-broken", "load": str(broken), **common})
    return launch(folder, 2, configs)


@pytest.mark.parametrize("name", FAULTS)
def test_last_complete_checkpoint_continues_bitwise(
    name: str, folder: Path, ended: dict[str, list[int]], continued: dict[str, Result]
) -> None:
    assert not (folder / f"{name}.pt").exists()  # the run did not reach its end
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


def test_processes_that_are_told_to_end_in_a_window_save_the_iterate(folder: Path) -> None:
    """In the second of four micro-batches of the third step."""
    configs: list[dict[str, Any]] = []
    resumed: list[dict[str, Any]] = []
    for strategy in STRATEGIES:
        common = {"strategy": strategy, "accumulate": 4}
        stopped = {"fault": "terminate", "fault_batch": 9, "port": free_port()}
        checkpoints = folder / f"stopped-{strategy}"
        configs.append(
            {"name": checkpoints.name, "checkpoints": str(checkpoints), **stopped, **common}
        )
        load = str(checkpoints / "step=2.ckpt")
        resumed.append({"name": f"two-{strategy}", "num_steps": 2, **common})
        resumed.append({"name": f"at-{strategy}", "num_steps": 2, "load": load, **common})
        resumed.append({"name": f"whole-{strategy}", **common})
    codes, output = start(folder, 2, configs).wait()
    assert codes == [0, 0], output[-4000:]
    results = launch(folder, 2, resumed)
    for strategy in STRATEGIES:
        assert (folder / f"stopped-{strategy}-0.code").read_text() == "0"
        assert not (folder / f"stopped-{strategy}.pt").exists()
        two, at = results[f"two-{strategy}"], results[f"at-{strategy}"]
        for name, tensor in two["tensors"].items():
            # x comes back from y, up to one unit in the last place
            torch.testing.assert_close(at["tensors"][name], tensor, rtol=1e-6, atol=1e-8)
        assert any(key.startswith(DIRECTION_KEY) for key in two["tensors"])
        assert difference(two, results[f"whole-{strategy}"], "weight") > 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_truncated_checkpoint_is_refused(
    strategy: str, folder: Path, truncated: dict[str, Result]
) -> None:
    error = truncated[f"truncated-{strategy}"]["error"]
    assert "failed finding central directory" in error or "EOFError" in error


@pytest.fixture(scope="module")
def truncated(folder: Path) -> dict[str, Result]:
    """What loading gives after the end of one file of a whole checkpoint was cut off."""
    paths = {strategy: folder / f"cut-{strategy}" for strategy in STRATEGIES}
    launch(
        folder,
        2,
        [
            {"name": f"to-cut-{n}", "strategy": n, "num_steps": 4, "save": str(path)}
            for n, path in paths.items()
        ],
    )
    for path in paths.values():
        file = path / "__1_0.distcp" if path.is_dir() else path
        file.write_bytes(file.read_bytes()[:-1000])
    configs: list[dict[str, Any]] = [
        {"name": f"truncated-{n}", "strategy": n, "load": str(path), "may_fail": True}
        for n, path in paths.items()
    ]
    return launch(folder, 2, configs)


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
