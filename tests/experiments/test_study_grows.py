"""A study grows in its folder, and another study does not enter it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_ema_nesterov.experiments.study import compare
from lightning_ema_nesterov.experiments.study.claim import claim, read_config
from lightning_ema_nesterov.experiments.study.compare import run_study
from lightning_ema_nesterov.experiments.study.load import load_study
from lightning_ema_nesterov.experiments.study.results import read_lines
from lightning_ema_nesterov.experiments.study.spec import Run
from lightning_ema_nesterov.experiments.study.train import train_run
from tests.experiments.toys import SGD, write

EMA = {"class_path": "EMANesterov", "init_args": {"ema_decay": 0.9}}
SMALL: dict[str, Any] = {
    "base_optimizers": {"sgd": SGD},
    "methods": {"ema": EMA},
    "seeds": [0],
    "num_steps": 4,
}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A small study that was trained to its end."""
    run_study(load_study(write(tmp_path, **SMALL)), tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        ({"seeds": [0, 1]}, {Run("sgd", m, 0.1, 1) for m in ("none", "ema")}),
        ({"seeds": [1]}, {Run("sgd", m, 0.1, 1) for m in ("none", "ema")}),
        (
            {"base_optimizers": {"sgd": {**SGD, "lrs": [0.1, 0.3]}}},
            {Run("sgd", m, 0.3, 0) for m in ("none", "ema")},
        ),
        (
            {"methods": {"snoo": {"class_path": "SNOO"}, "ema": EMA}},
            {Run("sgd", "snoo", 0.1, 0)},
        ),
        (
            {"base_optimizers": {"sgd": SGD, "adam": {"class_path": "Adam", "lrs": [0.01]}}},
            {Run("adam", m, 0.01, 0) for m in ("none", "ema")},
        ),
    ],
    ids=["seed", "only another seed", "learning rate", "method", "base optimizer"],
)
def test_more_of_it_is_the_same_study(
    changes: dict[str, Any], new: set[Run], out: Path, tmp_path: Path
) -> None:
    before, kept = contents(out / "runs"), read_lines(out / "runs.jsonl")
    run_study(load_study(write(tmp_path, **{**SMALL, **changes})), out)
    assert {path: contents(out / "runs")[path] for path in before} == before  # not trained again
    after = read_lines(out / "runs.jsonl")
    assert after[: len(kept)] == kept
    added = {result.run for result in after[len(kept) :]}
    # The baseline is at twice the learning rate of ema, too, where its seed is new.
    assert new <= added
    assert all(run.method == "none" for run in added - new)
    assert {r.run.seed for r in after} == set(read_config(out)["seeds"])  # type: ignore[index]


def test_what_the_folder_holds_is_kept_in_its_order(out: Path, tmp_path: Path) -> None:
    """The methods' order is that of their colours in the report."""
    lrs = {"sgd": {**SGD, "lrs": [0.05]}}
    methods = {"snoo": {"class_path": "SNOO"}}
    changes = {"methods": methods, "seeds": [3], "base_optimizers": lrs}
    finished = [result.run for result in read_lines(out / "runs.jsonl")]
    claim(load_study(write(tmp_path, **{**SMALL, **changes})), out, finished)
    config = read_config(out)
    assert config is not None
    assert list(config["methods"]) == ["none", "ema", "snoo"]
    assert config["seeds"] == [0, 3]
    assert config["base_optimizers"]["sgd"]["lrs"] == [0.1, 0.05]


@pytest.mark.parametrize(
    ("changes", "different"),
    [
        ({"num_steps": 8}, "num_steps"),
        ({"lr_decay": 0.5}, "lr_decay"),
        ({"lr_warmup": 0.5}, "lr_warmup"),
        ({"num_validations": 2}, "num_validations"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches"),
        ({"precision": "bf16-mixed"}, "precision"),
        ({"gradient_clip_val": 0.5}, "gradient_clip_val"),
        ({"average_shares": [0.5]}, "average_shares"),
        ({"methods": {"ema": {**EMA, "lr_decay": 0.1}}}, "methods.ema"),
        ({"model": {"class_path": "tests.toys.Toy", "init_args": {"make_optimizer": 1}}}, "model"),
        ({"methods": {"ema": {"class_path": "EMANesterov"}}}, "methods.ema"),
        ({"methods": {"ema": {"class_path": "SNOO"}}}, "methods.ema"),
        (
            {"base_optimizers": {"sgd": {**SGD, "init_args": {"momentum": 0.5}}}},
            "base_optimizers.sgd",
        ),
        (
            {"base_optimizers": {"sgd": {**SGD, "instead": {"ema": {**SGD, "lr_decay": 0.1}}}}},
            "base_optimizers.sgd",
        ),
    ],
)
def test_folder_of_another_study_is_refused_and_left_alone(
    changes: dict[str, Any], different: str, out: Path, tmp_path: Path
) -> None:
    before = contents(out)
    study = load_study(write(tmp_path, **{**SMALL, **changes}))
    with pytest.raises(ValueError, match=f"holds another study: {different} differ. .*another out"):
        run_study(study, out)
    assert contents(out) == before


def test_seed_that_chose_must_not_confirm_later(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_study(load_study(write(tmp_path, **{**SMALL, "confirming_seeds": [2]})), out)
    before = contents(out)
    with pytest.raises(ValueError, match=r"the seeds \[2\] do one in this folder and the other"):
        run_study(load_study(write(tmp_path, **{**SMALL, "seeds": [2]})), out)
    assert contents(out) == before


def test_config_that_was_cut_off_is_named(out: Path, tmp_path: Path) -> None:
    path = out / "study.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"study\.json is not JSON: "):
        run_study(load_study(write(tmp_path, **SMALL)), out)


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no study"):
        run_study(load_study(write(tmp_path)), tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["precious.txt"]
    with pytest.raises(ValueError, match="num_workers must be at least 1"):
        run_study(load_study(write(tmp_path)), tmp_path / "new", num_workers=0)
    assert not (tmp_path / "new").exists()


def test_run_that_failed_at_once_does_not_block_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(compare, "train_run", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run_study(load_study(write(tmp_path, **SMALL)), tmp_path / "out")
    changed = load_study(write(tmp_path, **{**SMALL, "num_steps": 8}))
    run_study(changed, tmp_path / "out")
    assert read_config(tmp_path / "out") == json.loads(json.dumps(changed.as_dict()))
    assert {r.run for r in read_lines(tmp_path / "out/runs.jsonl")} == set(changed.runs())


def test_method_whose_runs_all_failed_can_be_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The baseline's run, which is finished, stays."""

    def fail(study: Any, run: Run, root: Path) -> None:
        if run.method == "ema":
            raise RuntimeError("no such dtype")
        train_run(study, run, root)

    with monkeypatch.context() as patch:
        patch.setattr(compare, "train_run", fail)
        with pytest.raises(RuntimeError, match="no such dtype"):
            run_study(load_study(write(tmp_path, **SMALL)), tmp_path / "out")
    before = read_lines(tmp_path / "out/runs.jsonl")
    assert {result.run.method for result in before} == {"none"}
    methods = {"ema": {"class_path": "EMANesterov", "init_args": {"ema_decay": 0.5}}}
    run_study(load_study(write(tmp_path, **{**SMALL, "methods": methods})), tmp_path / "out")
    after = read_lines(tmp_path / "out/runs.jsonl")
    assert after[: len(before)] == before
    assert {result.run.method for result in after} == {"none", "ema"}


def test_optimizer_that_the_model_does_not_allow_is_refused_before_the_first_run(
    tmp_path: Path,
) -> None:
    """The toy has no embedding, so nobody can tell its head."""
    methods = {"ema": {"class_path": "EMANesterov", "lookahead_step_size_by_role": {"head": 0.0}}}
    scale = {"class_path": "lightning_ema_nesterov.optimizers.SCALE", "lrs": [0.01]}
    for changes in ({"methods": methods}, {"base_optimizers": {"sgd": SGD, "scale": scale}}):
        with pytest.raises(ValueError, match="embedding"):
            run_study(load_study(write(tmp_path, **{**SMALL, **changes})), tmp_path / "out")
    assert not (tmp_path / "out").exists()
