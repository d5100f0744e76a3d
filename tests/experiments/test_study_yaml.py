"""The YAML of a study: what is read, and what is refused with one line."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_ema_nesterov.cli import main
from lightning_ema_nesterov.experiments.study.load import load_study
from lightning_ema_nesterov.experiments.study.report import write_report
from tests.experiments.toys import SGD, config, write

METHODS = "EMANesterov, GPA, SNOO, Lookahead, ScheduleFree"
MODEL = "tests.experiments.toys.Model"
BASE_LRS = "base_optimizers.x.lrs must be a list of numbers"


def with_line(old: str, new: str) -> str:
    """The text of a study with one part of it written in another way."""
    text = yaml.safe_dump(config(), sort_keys=False)
    assert text.count(old) == 1
    return text.replace(old, new)


def load_text(text: str, folder: Path) -> Any:
    path = folder / "study.yaml"
    path.write_text(text)
    return load_study(path)


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    """PyYAML alone reads ``1e-3`` and ``1e30`` as text."""
    lrs = "    lrs:\n    - 0.05\n    - 1.0e+30\n"
    study = load_text(with_line(lrs, "    lrs: [3e-3, 1E-2, 1e30]\n"), tmp_path)
    assert study.base_optimizers["sgd"].lrs == [0.003, 0.01, 1e30]
    study = load_text(with_line("num_steps: 20", "num_steps: 1e3"), tmp_path)
    assert study.num_steps == 1000
    assert isinstance(study.num_steps, int)
    study = load_text(with_line("momentum: 0.9", "momentum: 9e-1"), tmp_path)
    assert study.base_optimizers["sgd"].init_args == {"momentum": 0.9}
    study = load_text(with_line("ema_decay: 0.9", "ema_decay: 9e-1"), tmp_path)
    assert study.methods["ema"].init_args == {"ema_decay": 0.9}


def test_text_stays_text_where_anything_is_allowed(tmp_path: Path) -> None:
    data = {"class_path": "lightning_ema_nesterov.experiments.data.TextWindows"}
    study = load_study(write(tmp_path, data={**data, "init_args": {"text": "007"}}))
    assert study.data.init_args == {"text": "007"}


def test_nothing_behind_a_key_is_its_default_or_null(tmp_path: Path) -> None:
    text = with_line("methods:\n", "methods:\n  none:\n").replace(
        "ema_decay: 0.9", "ema_decay: 0.9\n    grid:\n    bases:"
    )
    study = load_text(text + "callbacks:\ngradient_clip_val:\n", tmp_path)
    assert study.methods["ema"].bases == []
    assert study.callbacks == []
    assert study.gradient_clip_val is None
    assert load_study(write(tmp_path)).gradient_clip_val == 1.0


def test_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"study\.yaml is empty\.$"):
        load_text("# nothing yet\n", tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_steps: 20", "num_steps:\t- 20", r"study.yaml is not YAML in line 5, column 1[12]: "),
        ("num_steps: 20", "num_steps 20", r"study.yaml is not YAML in line \d, column \d+: could"),
        (
            "num_steps: 20",
            "\tnum_steps: 20",
            "is not YAML in line 5, column 1: found a tab character",
        ),
    ],
)
def test_what_is_not_yaml_is_shown_its_line(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_text(with_line(old, new), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [0]}, "study has the unknown key 'sedes'; known are model, data, num_steps"),
        ({"seeds": 3}, "seeds must be a list of whole numbers, got 3."),
        ({"seeds": [0.5]}, r"seeds must be a list of whole numbers, got \[0.5\]."),
        ({"seeds": None}, "seeds must be a list of whole numbers, got None."),
        ({"seeds": [-1]}, r"seeds must be in \[0, 4294967295\], got -1"),
        ({"seeds": [1, 1]}, "seeds must be different numbers"),
        ({"num_steps": 20.5}, "num_steps must be a whole number, got 20.5."),
        ({"num_steps": "many"}, "num_steps must be a whole number, got 'many'."),
        ({"num_steps": 21}, "num_steps must be a positive multiple of num_validations"),
        ({"lr_decay": 2.0}, r"lr_decay must be in \[0, 1\], got 2.0"),
        ({"gradient_clip_val": "big"}, "gradient_clip_val must be a number or null, got 'big'."),
        ({"gradient_clip_val": -1.0}, "gradient_clip_val must be above 0, or null"),
        ({"num_threads": 0}, "num_threads must be at least 1, got 0"),
        (
            {"accelerator": "gpuu"},
            "accelerator and precision must be what this machine has, got 'gpuu'",
        ),
        (
            {"lr_warmup": 0.2, "lr_decay": 0.9},
            "lr_warmup and lr_decay must fit into the run, got 0.2 and 0.9 for none on sgd: ",
        ),
        ({"quick": 5}, "quick must be a mapping of names, got 5"),
        (
            {"accelerator": "tpu"},
            "accelerator and precision must be what this machine has, got 'tpu'",
        ),
    ],
)
def test_wrong_values_of_the_study_are_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as error:
        load_study(write(tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({**SGD, "lrs": []}, "base_optimizers.x.lrs must be learning rates above 0"),
        ({**SGD, "lrs": 0.1}, f"{BASE_LRS}, got 0.1."),
        ({**SGD, "lrs": ["big"]}, rf"{BASE_LRS}, got \['big'\]."),
        ({**SGD, "lr_decay": 2}, r"base_optimizers.x.lr_decay must be in \[0, 1\], got 2"),
        ({**SGD, "lr": 1}, "base_optimizers.x has the unknown key 'lr'; known are class_path, lrs"),
        ({**SGD, "init_args": 3}, "base_optimizers.x.init_args must be a mapping of names, got 3"),
        ({**SGD, "init_args": {"betas": 1}}, "known are params, lr"),
        ({"class_path": "SGD"}, "base_optimizers.x lacks lrs"),
        ({"class_path": "Adam2", "lrs": [1]}, "base_optimizers.x.*Adam, AdamW"),
        ({"class_path": "torch.nn.ReLU", "lrs": [1]}, "another class"),
        ({**SGD, "instead": {"none": SGD, "y": SGD}}, "instead: 'y' is not known; known are none"),
        ({**SGD, "instead": {"none": {**SGD, "lrs": 1}}}, "base_optimizers.x.instead.none.lrs"),
        ("SGD", "base_optimizers.x must have class_path, lrs, .*, got 'SGD'"),
    ],
)
def test_wrong_base_optimizers_are_named(base: Any, message: str, tmp_path: Path) -> None:
    methods = {"ema": {"class_path": "EMANesterov"}}
    with pytest.raises(ValueError, match=message) as error:
        load_study(write(tmp_path, methods=methods, base_optimizers={"x": base}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"class_path": "EMA"}, f"methods.x.class_path must be one of {METHODS}, or .* Callback.*"),
        ({"class_path": MODEL}, "'tests.experiments.toys.Model' is none"),
        ({"class_path": "GPA", "init_args": {"mu": 1}}, "methods.x.*known are mu_y, mu_x"),
        ({"class_path": "GPA", "init_args": {"mu_x": 2}}, "methods.x: mu_x must be in"),
        ({"class_path": "GPA", "bases": ["lion"]}, "bases: 'lion' is not known; known are sgd, ad"),
        ({"class_path": "GPA", "bases": "sgd"}, "methods.x.bases must be a list of names, got 'sg"),
        ({"class_path": "GPA", "grid": {"mu_x": 1}}, "methods.x.grid must be lists of values by n"),
        ({"klass": 1}, "methods.x has the unknown key 'klass'; known are class_path, init_args"),
        ({"class_path": "GPA", "grid": {"mu_x": []}}, "methods.x.grid.mu_x must have values"),
        ({"class_path": "GPA", "grid": {"mu_x": [0.9, 0.5, 0.9]}}, "mu_x must have different v"),
        (
            {"class_path": "GPA", "grid": {"mu_x": ["a/b"]}},
            r"methods must have names that can be those of folders, got 'x\[mu_x=a/b\]'",
        ),
        (None, "methods.x must have a class_path"),
    ],
)
def test_wrong_methods_are_named(method: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_study(write(tmp_path, methods={"x": method}))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="methods must be a mapping of names, got"):
        load_study(write(tmp_path, methods=[]))


def test_names_are_those_of_folders(tmp_path: Path) -> None:
    for name in ("adam/w", 1, False, ".."):
        bases: Any = {name: SGD}
        match = "^base_optimizers must have names that can be those of folders, got"
        with pytest.raises(ValueError, match=match):
            load_study(write(tmp_path, base_optimizers=bases))
    with pytest.raises(ValueError, match=r"methods\.none is the baseline, and must have no class"):
        load_study(write(tmp_path, methods={"none": {"class_path": "GPA"}}))


@pytest.mark.parametrize(
    "phases", [{"warmup": 15, "rest": 6}, {"warmup": 30}, {"rest": 0.5, "warmup": 11}]
)
def test_a_method_that_does_not_fit_the_run_is_named_before_the_first_run(
    phases: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Among methods that would be trained first."""
    method = {"class_path": "EMANesterov", "init_args": phases}
    methods = {"good": {"class_path": "EMANesterov"}, "long": method}
    path = write(tmp_path, methods=methods, base_optimizers={"sgd": SGD})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ema-nesterov", "compare", str(path)])
    with pytest.raises(SystemExit) as end:
        main()
    assert re.match(r"ema-nesterov: methods.long: .*longer than the run.* of 20\.", str(end.value))
    assert not (tmp_path / "out").exists()
    longer = {"methods": methods, "base_optimizers": {"sgd": SGD}, "num_steps": 40}
    assert load_study(write(tmp_path, **longer)).num_steps == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"class_path": "tests.experiments.toys.Mode"}},
            "model.class_path must be the dotted path of a LightningModule, and .*Mode' is none. "
            "In tests.experiments.toys there are: Model, Toy",
        ),
        ({"model": {"class_path": "toyz.Model"}}, "model.*LightningModule.*No module named 'toyz'"),
        ({"model": {"class_path": "Model"}}, "model.*'Model' cannot be imported: it has no dot"),
        ({"model": {"path": "x"}}, "model has the unknown key 'path'; known are class_path"),
        ({"model": MODEL}, "model must have class_path, init_args, got 'tests.experiments"),
        ({"model": {"class_path": MODEL, "init_args": {"width": 1}}}, "model.*unknown key 'width'"),
        ({"data": {"class_path": MODEL}}, "data.class_path .* LightningDataModule, .*there are: D"),
        ({"data": {"class_path": "no.such.Data"}}, "data.*LightningDataModule.*named 'no'"),
        ({"callbacks": {"class_path": MODEL}}, "callbacks must be a list, got"),
        ({"callbacks": [{"class_path": "Timer"}]}, "callbacks.class_path .* of a Callback"),
        (
            {"callbacks": [{"class_path": "lightning.pytorch.callbacks.LambdaCallback.x"}]},
            "callbacks.class_path .* of a Callback",
        ),
        (
            {"callbacks": [{"class_path": "lightning.pytorch.callbacks.EarlyStopping"}]},
            "callbacks.init_args do not fit EarlyStopping: missing a required argument: 'monitor'",
        ),
    ],
)
def test_wrong_classes_are_told_what_is_expected_there(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_study(write(tmp_path, **changes))
    assert "\n" not in str(error.value)
    assert METHODS not in str(error.value)  # those are no models


def test_module_that_is_not_python_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_written.py").write_text("class Model(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))  # as the command does
    with pytest.raises(ValueError, match=r"cannot be imported: .*\(half_written\.py, line 1\)"):
        load_study(write(tmp_path, model={"class_path": "half_written.Model"}))


def test_missing_keys_and_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("num_steps: 10")
    with pytest.raises(
        ValueError, match="study lacks model, data, base_optimizers, methods, seeds"
    ):
        load_study(path)
    with pytest.raises(ValueError, match="has no quick form"):
        load_study(path, is_quick=True)
    path.write_text("- 1")
    with pytest.raises(ValueError, match=r"study must be a mapping of names, got \[1\]"):
        load_study(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_study(tmp_path / "none.yaml")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_study(tmp_path)
    with pytest.raises(FileNotFoundError, match="event files of finished runs"):
        write_report(tmp_path)
