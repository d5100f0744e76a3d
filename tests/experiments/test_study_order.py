"""In which order a study trains, at which learning rates, and with which parameter groups."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_ema_nesterov.experiments.study.claim import claim
from lightning_ema_nesterov.experiments.study.load import load_study
from lightning_ema_nesterov.experiments.study.results import read_event_folder
from lightning_ema_nesterov.experiments.study.spec import Run, Study
from lightning_ema_nesterov.experiments.study.train import train_run
from lightning_ema_nesterov.optimizers.roles import ROLES
from tests.experiments.toys import STUDIES, write

BASES = {
    "sgd": {"class_path": "SGD", "lrs": [0.2, 0.1, 0.4]},
    "adam": {"class_path": "Adam", "lrs": [0.02, 0.01]},
}
EMA = {"class_path": "EMANesterov", "grid": {"lookahead_step_size": [0.5, -0.3]}}


def test_first_learning_rate_of_everything_comes_first(tmp_path: Path) -> None:
    """So that a study that was stopped early compares all methods, and not one base alone."""
    methods = {"ema": EMA}
    study = load_study(
        write(tmp_path, base_optimizers=BASES, methods=methods, has_gained_baseline=False)
    )
    names = ["none", "ema[lookahead_step_size=0.5]", "ema[lookahead_step_size=-0.3]"]
    places = [("sgd", 0.2), ("adam", 0.02), ("sgd", 0.1), ("adam", 0.01), ("sgd", 0.4)]
    runs = [Run(base, name, lr, 0) for base, lr in places for name in names]
    assert study.runs() == [*runs, *(Run(r.base, r.method, r.lr, 1) for r in runs)]


def test_baseline_at_the_gain_can_be_left_out(tmp_path: Path) -> None:
    for has_gain, expected in [(True, [0.2, 0.4, 0.154]), (False, [0.2])]:
        bases = {"sgd": {"class_path": "SGD", "lrs": [0.2]}}
        study = load_study(
            write(
                tmp_path,
                base_optimizers=bases,
                methods={"ema": EMA},
                seeds=[0],
                has_gained_baseline=has_gain,
            )
        )
        assert [run.lr for run in study.runs() if run.method == "none"] == expected


def test_method_may_have_learning_rates_of_its_own(tmp_path: Path) -> None:
    longer: dict[str, Any] = {"class_path": "EMANesterov", "lrs": [0.3], "bases": ["sgd"]}
    methods = {"ema": EMA, "longer": longer}
    path = write(tmp_path, base_optimizers=BASES, methods=methods, seeds=[0])
    runs = load_study(path).runs()
    assert [(r.base, r.lr) for r in runs if r.method == "longer"] == [("sgd", 0.3)]
    assert Run("sgd", "none", 0.6, 0) in runs
    longer["lrs"] = [0.3, -0.1]
    with pytest.raises(ValueError, match=r"methods\.longer\.lrs must be learning rates above 0"):
        load_study(write(tmp_path, base_optimizers=BASES, methods=methods))


def test_folder_of_a_former_version_is_entered(tmp_path: Path) -> None:
    """It lacks the keys that came later, and what they mean by default was so."""
    study, out = load_study(write(tmp_path)), tmp_path / "out"
    finished = [study.runs()[0]]
    claim(study, out, finished)
    known = json.loads((out / "study.json").read_text())
    for key in ("average_shares", "has_gained_baseline", "num_threads"):
        del known[key]
    (out / "study.json").write_text(json.dumps(known))
    claim(study, out, finished)
    with pytest.raises(ValueError, match="num_threads differ"):
        claim(load_study(write(tmp_path, num_threads=2)), out, finished)


@pytest.mark.slow
def test_optimizer_that_wants_roles_gets_them(tmp_path: Path) -> None:
    """SCALE refuses groups without."""
    study = _language_study(tmp_path)
    [run] = [run for run in study.runs() if run.method == "none"]
    train_run(study, run, tmp_path)
    assert list((tmp_path / run.folder).glob("events.*"))


def _language_study(folder: Path) -> Study:
    text = folder / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 200)
    data = {"text": str(text), "batch_size": 1, "num_validation_windows": 1}
    experiments = "lightning_ema_nesterov.experiments"
    scale = {"class_path": "lightning_ema_nesterov.optimizers.SCALE", "lrs": [0.001]}
    return load_study(
        write(
            folder,
            model={"class_path": f"{experiments}.model.ByteDecoder"},
            data={"class_path": f"{experiments}.data.TextWindows", "init_args": data},
            base_optimizers={"scale": scale},
            methods={"ema": {"class_path": "EMANesterov"}},
            has_gained_baseline=False,
            seeds=[0],
            num_steps=2,
            num_validations=1,
        )
    )


def test_joint_study_asks_what_it_promises() -> None:
    """Every base optimizer at four rates and six step sizes, 8,192 tokens a step."""
    study = load_study(STUDIES / "joint.yaml")
    runs = study.runs()
    assert study.data.init_args["batch_size"] * 64 == 8192
    assert study.num_steps >= 1500
    for base in ("adamw", "muon", "soap", "scale"):
        step_sizes: dict[float, set[float]] = {}
        for run in (run for run in runs if run.base == base):
            step_size = study.methods[run.method].lookahead_step_size
            step_sizes.setdefault(step_size, set()).add(run.lr)
        assert set(step_sizes) == {-0.3, 0.0, 0.15, 0.3, 0.5, 0.7}
        assert all(len(lrs) == 4 for lrs in step_sizes.values())
    centre = [(run.base, run.method) for run in runs[:14]]
    assert len(set(centre)) == 14
    assert {base for base, _ in centre} == {"adamw", "muon"}


@pytest.mark.slow
def test_scope_of_a_study_is_that_of_the_training(tmp_path: Path) -> None:
    """The seed, the data and the base are the same: only what looks ahead differs."""
    study = _language_study(tmp_path)
    ema = replace(study.methods["ema"], init_args={"ema_decay": 0.5, "warmup": 0, "rest": 0})
    zero = replace(ema, lookahead_step_size_by_role=dict.fromkeys(ROLES, 0.0))
    part = replace(ema, lookahead_step_size_by_role={"embedding": 0.0, "head": 0.0})
    methods = {**study.methods, "ema": ema, "zero": zero, "part": part}
    study = replace(study, methods=methods, num_steps=6, lr_warmup=0.0)
    losses = {}
    for name in methods:
        run = Run("scale", name, 0.01, 0)
        warns = pytest.warns(UserWarning, match="never looks ahead")
        with warns if name == "zero" else nullcontext():
            train_run(study, run, tmp_path)
        losses[name] = read_event_folder(tmp_path / run.folder).final
    assert losses["zero"] == losses["none"]
    assert len({losses[name] for name in ("none", "ema", "part")}) == 3


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"lookahead_step_size_by_role": {"tail": 0.0}}, "must have roles, .* got 'tail'"),
        ({"lookahead_step_size_by_role": {"head": 1.0}}, r"by_role\.head must be in \(-1, 1\)"),
        (
            {"class_path": "SNOO", "lookahead_step_size_by_role": {"head": 0.0}},
            "must go with EMANesterov, got SNOO",
        ),
    ],
)
def test_scope_that_cannot_be_is_refused_before_the_first_run(
    method: dict[str, Any], message: str, tmp_path: Path
) -> None:
    methods = {"ema": {"class_path": "EMANesterov", **method}}
    with pytest.raises(ValueError, match=rf"^methods\.ema: .*{message}"):
        load_study(write(tmp_path, base_optimizers=BASES, methods=methods))
