"""Parameter groups with a step size of their own, on shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.cases import EMA, FSDP2, OneProcess, TrainerRun, stopped_and_resumed
from tests.distributed.processes import Results, difference, launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RULES = {"separate": EMA(), "compiled": EMA(compile=True)}
RUNS = {
    name: TrainerRun(name=name, strategy=FSDP2(), rule=rule, vector_step_size=-0.3)
    for name, rule in RULES.items()
}


@pytest.fixture(scope="module")
def scoped(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("scoped")
    moves = TrainerRun(name="moves", strategy=FSDP2(), vector_step_size=-0.3, observe="moves")
    return launch(folder, 2, [*stopped_and_resumed(folder, list(RUNS.values())), moves])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Results:
    run = TrainerRun(name="scoped", strategy=OneProcess(), vector_step_size=-0.3)
    whole = replace(run, name="one group", vector_step_size=None)
    return launch(tmp_path_factory.mktemp("alone"), 1, [run, whole])


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one_and_go_on_bitwise(
    name: str, scoped: Results, alone: Results
) -> None:
    # float32 rounding of the sums over two halves of the batch, after 8 steps of AdamW.
    assert difference(scoped[name], alone["scoped"]) < 1e-5
    assert difference(alone["one group"], alone["scoped"], "weight") > 1e-4
    assert difference(scoped[f"{name}-resumed"], scoped[name]) == 0.0
    assert difference(scoped[f"{name}-saved"], scoped[name], "weight") > 1e-3


def test_moves_of_groups_do_not_communicate(scoped: Results) -> None:
    assert set(scoped["moves"]["moves"]) == {0}


def test_key_is_in_the_folder_that_processes_write(tmp_path: Path) -> None:
    """Another value in the code gives way to that of the checkpoint, like a learning rate."""
    run = TrainerRun(name="run", strategy=FSDP2(), vector_step_size=-0.3)
    path = tmp_path / "half"
    saved = replace(run, name="saved", num_steps=4, save=path)
    other = replace(run, name="other", load=path, vector_step_size=0.9)
    results = launch(tmp_path, 2, [run, saved, other])
    assert difference(results["other"], results["run"]) == 0.0
