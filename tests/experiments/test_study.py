"""Studies: what they train, how they go on, what they report."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ema_nesterov.cli import main
from lightning_ema_nesterov.experiments.event_files import Point
from lightning_ema_nesterov.experiments.study.compare import run_study
from lightning_ema_nesterov.experiments.study.load import load_study
from lightning_ema_nesterov.experiments.study.report import write_report
from lightning_ema_nesterov.experiments.study.results import Result, read_events, read_lines
from lightning_ema_nesterov.experiments.study.spec import Run, Study
from lightning_ema_nesterov.experiments.study.tables import markdown_table, standings
from tests.toys import Batches, Toy, adamw

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "recipes/studies"


class Model(Toy):
    """The toy as a stranger's model: it diverges where the learning rate is beyond reason."""

    def __init__(self) -> None:
        super().__init__(adamw)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch)
        return loss


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Batches(30), batch_size=None, shuffle=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Batches(3), batch_size=None)


def config(**changes: Any) -> dict[str, Any]:
    return {
        "model": {"class_path": "tests.experiments.test_study.Model"},
        "data": {"class_path": "tests.experiments.test_study.Data"},
        "num_steps": 20,
        "num_validations": 4,
        "seeds": [0, 1],
        "base_optimizers": {
            "sgd": {"class_path": "SGD", "init_args": {"momentum": 0.9}, "lrs": [0.05, 1e30]},
            "adamw": {
                "class_path": "torch.optim.AdamW",
                "lrs": [0.01],
                "instead": {
                    "free": {"class_path": "schedulefree.AdamWScheduleFree", "lrs": [0.03]}
                },
            },
        },
        "methods": {
            "ema": {"class_path": "EMANesterov", "init_args": {"ema_decay": 0.9}},
            "free": {"class_path": "ScheduleFree", "bases": ["adamw"]},
        },
        **changes,
    }


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(config(**changes), sort_keys=False))
    return path


def environment_with_tests() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}


@pytest.fixture(autouse=True)
def _find_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture(scope="module")
def study_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was trained to its end."""
    sys.path.insert(0, str(ROOT))
    folder = tmp_path_factory.mktemp("study")
    run_study(load_study(write(folder)), folder / "out")
    return folder / "out"


def test_every_combination_is_trained_and_the_baseline_at_the_gain_too(study_dir: Path) -> None:
    runs = {(r.run.base, r.run.method, r.run.lr) for r in read_lines(study_dir / "runs.jsonl")}
    assert runs == {
        # The step size is 0.5, so the baseline is trained at twice each learning rate as well.
        *(("sgd", "none", lr) for lr in (0.05, 0.1, 1e30, 2e30)),
        *(("sgd", "ema", lr) for lr in (0.05, 1e30)),
        *(("adamw", "none", lr) for lr in (0.01, 0.02)),
        ("adamw", "ema", 0.01),
        ("adamw", "free", 0.03),
    }


def test_runs_differ_where_they_should_and_only_there(study_dir: Path) -> None:
    results = {r.run: r for r in read_lines(study_dir / "runs.jsonl")}
    finals = [results[Run("adamw", method, 0.01, 0)].final for method in ("none", "ema")]
    finals += [results[Run("adamw", "none", 0.01, 1)].final]
    finals += [results[Run("adamw", "none", 0.02, 0)].final]
    finals += [results[Run("adamw", "free", 0.03, 0)].final]
    assert len(set(finals)) == len(finals)
    run = results[Run("adamw", "ema", 0.01, 0)]
    assert [point.step for point in run.val_loss] == [5, 10, 15, 20]
    assert run.step_size == 0.5
    assert run.state_per_parameter == 3.0
    assert results[Run("adamw", "none", 0.01, 0)].state_per_parameter == 2.0
    assert run.step_seconds > 0


def test_diverged_run_is_recorded_and_the_study_goes_on(study_dir: Path) -> None:
    results = read_lines(study_dir / "runs.jsonl")
    diverged = {(r.run.base, r.run.lr) for r in results if r.is_diverged}
    assert diverged == {("sgd", 1e30), ("sgd", 2e30)}
    assert all(math.isinf(r.final) for r in results if r.is_diverged)
    assert len(results) == 20


def test_event_files_alone_hold_what_the_lines_hold(study_dir: Path) -> None:
    lines = {r.run: r for r in read_lines(study_dir / "runs.jsonl")}
    events = {r.run: r for r in read_events(study_dir / "runs")}
    assert set(lines) == set(events)
    for run, line in lines.items():
        event = events[run]
        assert event.is_diverged == line.is_diverged
        assert event.step_size == line.step_size
        assert event.step_seconds == pytest.approx(line.step_seconds, abs=1e-5)
        for found, kept in zip(event.val_loss, line.val_loss, strict=True):
            assert found.step == kept.step
            assert found.value == pytest.approx(kept.value, abs=1e-5, nan_ok=True)


def test_finished_runs_are_not_repeated_and_missing_ones_are(study_dir: Path) -> None:
    def times() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in study_dir.rglob("events.out.tfevents.*")}

    study, before = load_study(study_dir.parent / "study.yaml"), times()
    lines = study_dir / "runs.jsonl"
    whole = lines.read_text()
    run_study(study, study_dir)
    assert times() == before

    kept = whole.splitlines(keepends=True)
    lines.write_text("".join(kept[:-1]) + kept[-1][:20])  # stopped while it wrote the last one
    run_study(study, study_dir)
    changed = {p for p, t in times().items() if before.get(p) != t}
    last = read_lines(lines)[-1]
    assert {p.parent for p in changed} == {study_dir / "runs" / last.run.folder}
    values = [
        str(json.loads(line)["val_loss"][-1][2])
        for line in (kept[-1], lines.read_text().splitlines()[-1])
    ]
    assert values[0] == values[1]
    lines.write_text(whole)


def test_study_that_was_killed_goes_on(tmp_path: Path) -> None:
    """By the command, killed after its first finished run, and again with two workers."""
    path = write(tmp_path, quick={"num_steps": 40})
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lightning_ema_nesterov.cli", "compare", str(path), "--quick"]
    command += ["--out_dir", str(out), "--num_workers"]
    environment = environment_with_tests()
    process = subprocess.Popen(
        [*command, "1"], env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while not (out / "runs.jsonl").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = read_lines(out / "runs.jsonl")
    assert 1 <= len(before) < 20

    process = subprocess.Popen([*command, "2"], env=environment, stderr=subprocess.DEVNULL)
    while len(read_lines(out / "runs.jsonl")) == len(before):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()  # it alone: its workers see it
    process.wait()
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(children) >= 2

    subprocess.run([*command, "1"], env=environment, check=True, capture_output=True)
    after = read_lines(out / "runs.jsonl")
    assert [r.run for r in after[: len(before)]] == [r.run for r in before]
    assert {result.run for result in after} == set(load_study(path).runs())
    assert len(after) == 20


@pytest.mark.parametrize("num_workers", ["1", "2"])
def test_ctrl_c_stops_with_one_line(num_workers: str, tmp_path: Path) -> None:
    path = write(tmp_path, num_steps=4000)
    command = [sys.executable, "-m", "lightning_ema_nesterov.cli", "compare", str(path)]
    process = subprocess.Popen(
        [*command, "--num_workers", num_workers],
        cwd=tmp_path,
        env=environment_with_tests(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("events.out.tfevents.*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    last = error.replace("\r", "\n").rstrip().splitlines()[-1]
    assert last == "Stopped. The same command goes on from here."
    assert "Traceback" not in error
    assert "leaked" not in error


@pytest.mark.parametrize("num_workers", ["1", "2"])
def test_model_beside_the_file_is_found(
    num_workers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And data in the current folder, of which Python's path says nothing."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/model_of_mine.py").write_text("from test_study import Model\n")
    (tmp_path / "data_of_mine.py").write_text("from test_study import Data\n")
    path = write(
        tmp_path / "beside",
        model={"class_path": "model_of_mine.Model"},
        data={"class_path": "data_of_mine.Data"},
        base_optimizers={"sgd": SGD},
        methods={"none": None},
        seeds=[0],
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "argv", ["x", "compare", str(path), "--num_workers", num_workers])
    main()
    [found] = read_lines(tmp_path / "out/studies/study/runs.jsonl")
    assert found.run == Run("sgd", "none", 0.1, 0)
    for name in ("model_of_mine", "data_of_mine"):
        del sys.modules[name]  # the next test's is another file


def test_folder_of_another_study_is_refused_and_left_alone(study_dir: Path, tmp_path: Path) -> None:
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in study_dir.rglob("*") if path.is_file()}

    before = contents()
    with pytest.raises(ValueError, match="holds another study: num_steps differ"):
        run_study(load_study(write(tmp_path, num_steps=40)), study_dir)
    assert contents() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no study"):
        run_study(load_study(write(tmp_path)), tmp_path / "other")
    with pytest.raises(ValueError, match="num_workers must be at least 1"):
        run_study(load_study(write(tmp_path)), tmp_path / "new", num_workers=0)


METHODS = "EMANesterov, GPA, SNOO, Lookahead, ScheduleFree"
SGD = {"class_path": "SGD", "lrs": [0.1]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [0]}, "study has the unknown key 'sedes'; known are model, data, num_steps"),
        ({"methods": {"x": {"class_path": "EMA"}}}, f"'EMA' is not known.*{METHODS}"),
        ({"methods": {"x": {"class_path": "GPA", "init_args": {"mu": 1}}}}, "known are mu_y, mu_x"),
        ({"methods": {"x": {"class_path": "GPA", "init_args": {"mu_x": 2}}}}, "mu_x must be in"),
        ({"methods": {"x": {"klass": 1}}}, "unknown key 'klass'; known are class_path, init_args"),
        ({"methods": {"x": None}}, "methods.x must have a class_path"),
        ({"methods": {"x": {"class_path": "GPA", "bases": ["lion"]}}}, "known are sgd, adamw"),
        ({"base_optimizers": {"x": {"class_path": "Adam2", "lrs": [1]}}}, "Adam, AdamW"),
        ({"base_optimizers": {"x": {"class_path": "torch.nn.ReLU", "lrs": [1]}}}, "another class"),
        ({"base_optimizers": {"x": {**SGD, "init_args": {"betas": 1}}}}, "known are params, lr"),
        ({"base_optimizers": {"x": {**SGD, "lrs": []}}}, "lrs must be learning rates above 0"),
        ({"base_optimizers": {"x": {**SGD, "instead": {"none": SGD, "y": SGD}}}}, "'y' is not"),
        ({"model": {"path": "x"}}, "model must have class_path and init_args"),
        ({"data": {"class_path": "no.such.Data"}}, "'no.such.Data' is not known"),
        ({"num_steps": 21}, "num_steps must be a positive multiple of num_validations"),
        ({"seeds": [1, 1]}, "seeds must be different numbers"),
        ({"lr_decay": 2.0}, r"lr_decay must be in \[0, 1\], got 2.0"),
        ({"methods": []}, "methods must be a mapping of names"),
    ],
)
def test_bad_input_is_named_before_the_first_run(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if "base_optimizers" in changes:
        changes = {**changes, "methods": {"ema": {"class_path": "EMANesterov"}}}
    with pytest.raises(ValueError, match=message):
        load_study(write(tmp_path, **changes))


def test_missing_keys_and_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("num_steps: 10")
    with pytest.raises(
        ValueError, match="study lacks model, data, base_optimizers, methods, seeds"
    ):
        load_study(path)
    with pytest.raises(ValueError, match="has no quick form"):
        load_study(path, is_quick=True)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_study(tmp_path / "none.yaml")
    with pytest.raises(FileNotFoundError, match="event files of finished runs"):
        write_report(tmp_path)


def test_a_grid_makes_a_method_of_each_combination(tmp_path: Path) -> None:
    grid = {"lookahead_step_size": [0.5, 0.75], "ema_decay": [0.0, 0.9]}
    methods = {"ema": {"class_path": "EMANesterov", "grid": grid}}
    study = load_study(write(tmp_path, methods=methods, base_optimizers={"sgd": SGD}, seeds=[0]))
    assert list(study.methods) == [
        "none",
        "ema[lookahead_step_size=0.5,ema_decay=0.0]",
        "ema[lookahead_step_size=0.5,ema_decay=0.9]",
        "ema[lookahead_step_size=0.75,ema_decay=0.0]",
        "ema[lookahead_step_size=0.75,ema_decay=0.9]",
    ]
    baseline = [run.lr for run in study.runs() if run.method == "none"]
    assert baseline == [0.1, 0.2, 0.4]  # 0.1 / (1 - 0.5) and 0.1 / (1 - 0.75)


def result(method: str, lr: float, seed: int, losses: list[float], **kwargs: Any) -> Result:
    points = [Point(10 * (idx + 1), float(idx), loss) for idx, loss in enumerate(losses)]
    values = {"step_seconds": 0.1, "state_per_parameter": 2.0, "step_size": 0.0, **kwargs}
    is_diverged = values.pop("is_diverged", False)
    return Result(Run("sgd", method, lr, seed), points, is_diverged, **values)


def test_standings_are_those_worked_by_hand() -> None:
    results = [
        *(result("none", 0.1, seed, [5.0, 2.0 + seed]) for seed in range(3)),  # mean 3
        *(result("none", 0.2, seed, [5.0, 4.0]) for seed in range(3)),
        *(result("none", 0.4, seed, [5.0, 1.0]) for seed in range(2)),  # a seed is missing
        # At 0.1 paired differences of -1, -1 and 0.5; 3.0 is reached after 20 of 30 steps.
        *(
            result("ema", 0.1, seed, [4.0, 2.5, 2.0 + seed + gap], step_size=0.5, **more)
            for seed, gap, more in (
                (0, -1.0, {"state_per_parameter": 3.0, "step_seconds": 0.15}),
                (1, -1.0, {"state_per_parameter": 3.0, "step_seconds": 0.15}),
                (2, 0.5, {"state_per_parameter": 3.0, "step_seconds": 0.15}),
            )
        ),
        *(result("ema", 0.2, seed, [9.0], is_diverged=True) for seed in range(3)),
    ]
    none, ema = standings(results, "sgd")
    assert (none.method, none.lr) == ("none", 0.1)
    assert (ema.method, ema.lr, ema.gained_lr) == ("ema", 0.1, 0.2)
    assert ema.gained == [4.0, 4.0, 4.0]
    # Mean -0.5, standard deviation sqrt(0.75), t with 2 degrees of freedom 4.3027.
    margin = 4.302653 * math.sqrt(0.75) / math.sqrt(3)
    assert ema.difference == pytest.approx((-0.5, -0.5 - margin, -0.5 + margin))
    assert ema.steps_to_target == 20
    assert none.steps_to_target == 20
    assert ema.extra_state == 1.0
    assert ema.step_time == pytest.approx(1.5)
    row = markdown_table([none, ema]).splitlines()[-1]
    assert row == (
        "| ema | 0.1 | 2.5000 ± 1.8028 | -0.5000 [-2.6513, +1.6513] | 4.0000 ± 0.0000 at 0.2 "
        "| 20 | 3.0 | +1.00 | 1.50 |"
    )


def test_report_is_one_page_with_all_figures(study_dir: Path) -> None:
    page = write_report(study_dir)
    html, text = page.read_text(), (page.parent / "report.md").read_text()
    figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(figures) == 4
    sources = re.findall(r'src="([^"]+)"', html)
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert "href" not in html
    assert "6 diverged" in html
    for base in ("sgd", "adamw"):
        assert markdown_table(standings(read_events(study_dir / "runs"), base)) in text
        assert f"<h2>{base}</h2>" in html


def test_report_of_a_grid_has_a_map_for_each_method(tmp_path: Path) -> None:
    grid = {"lookahead_step_size": [0.5, 0.75], "direction_dtype": ["float32", "int8"]}
    methods = {
        "ema": {"class_path": "EMANesterov", "grid": grid},
        "snoo": {"class_path": "SNOO", "grid": {"outer_lr": [0.8, 1.0], "outer_momentum": [0.5]}},
    }
    path = write(tmp_path, methods=methods, base_optimizers={"sgd": SGD}, seeds=[0], num_steps=4)
    run_study(load_study(path), tmp_path / "out")
    text = (write_report(tmp_path / "out").parent / "report.md").read_text()
    assert re.findall(r"\((\w+\.png)\)", text) == ["sgd_ema_grid.png", "sgd_snoo_grid.png"]
    assert text.count("| ema[") == 4
    assert text.count("| snoo[") == 2


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_run_in_miniature(path: Path, tmp_path: Path) -> None:
    """The quick form of each, with ten steps, one learning rate, and a text of the test's own."""
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 200)
    raw = yaml.safe_load(path.read_text())
    raw["data"]["init_args"].update(text=str(text), batch_size=1, num_validation_windows=1)
    quick = {**raw["quick"], "num_steps": 10, "num_validations": 1}
    for base in raw["base_optimizers"].values():
        base["lrs"] = base["lrs"][:1]
        for other in base.get("instead", {}).values():
            other["lrs"] = other["lrs"][:1]
    quick["methods"] = {
        name: method and {**method, "grid": {k: v[:1] for k, v in method.get("grid", {}).items()}}
        for name, method in raw["methods"].items()
    }
    copy = tmp_path / path.name
    copy.write_text(yaml.safe_dump({**raw, "quick": quick}))
    study = load_study(copy, is_quick=True)
    full = load_study(path)
    assert set(study.base_optimizers) == set(full.base_optimizers)
    run_study(study, tmp_path / "out")
    results = read_events(tmp_path / "out/runs")
    assert {result.run for result in results} == set(study.runs())
    assert not any(result.is_diverged for result in results)


def test_one_seed_gives_one_order_and_two_give_two(tmp_path: Path) -> None:
    from lightning_ema_nesterov.experiments.data import TextWindows

    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(256)) * 20)

    def first_batch(seed: int) -> Tensor:
        torch.manual_seed(seed)
        data = TextWindows(str(text), window_size=8)
        data.setup("fit")
        batch: Tensor = next(iter(data.train_dataloader()))
        return batch

    assert first_batch(0).shape == (8, 9)
    assert torch.equal(first_batch(0), first_batch(0))
    assert not torch.equal(first_batch(0), first_batch(1))


def test_study_is_kept_whole_in_its_folder(study_dir: Path) -> None:
    kept = json.loads((study_dir / "study.json").read_text())
    study: Study = load_study(study_dir.parent / "study.yaml")
    assert kept == json.loads(json.dumps(study.as_dict()))


def test_convex_rates_are_those_of_the_theory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, with fewer problems and less noise to average."""
    from lightning_ema_nesterov.study import convex

    monkeypatch.setattr(convex, "CONDITIONS", (100.0,))
    monkeypatch.setattr(convex, "NUM_NOISY_STEPS", 600)
    results = convex.run_convex(tmp_path / "convex.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "convex.jsonl").read_text().splitlines()]
    assert [line["measured"] for line in lines] == [result.measured for result in results]
    by_key = {(r.problem, r.ema_decay): r for r in results}
    for (problem, ema_decay), found in by_key.items():
        if found.expected is not None:
            # Two equal eigenvalues: the distance shrinks like t (1 - s)^t, a little later.
            assert found.measured == pytest.approx(found.expected, abs=0.02)
            if problem == "quadratic" and ema_decay is not None:
                descent = by_key["quadratic", None].measured
                assert found.measured < descent - 0.015  # faster than gradient descent
    floors = [by_key["noisy quadratic", ema_decay].measured for ema_decay in (None, 0.9, 0.5, 0.0)]
    assert floors[0] == 1.0
    assert floors == sorted(floors)  # the shorter the memory, the more of the noise
    assert "noisy quadratic" in capsys.readouterr().out
    with pytest.raises(ValueError, match="ema_decay must be in"):
        convex.convex_step_size(10.0, 0.95)


def test_example_in_the_readme_of_the_studies_is_a_study(tmp_path: Path) -> None:
    text = (STUDIES / "README.md").read_text()
    [example] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my.yaml").write_text(
        re.sub(r"my_model\.My", "tests.experiments.test_study.", example)
    )
    study = load_study(tmp_path / "my.yaml")
    assert len(study.methods) == 3 + 4
    assert study.model == {"class_path": "tests.experiments.test_study.Model"}


RESULTS = sorted(path for path in (STUDIES / "results").glob("*.jsonl") if path.stem != "convex")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_tables_of_the_studies_are_those_of_their_lines(path: Path) -> None:
    text = (STUDIES / "README.md").read_text()
    results = read_lines(path)
    runs = load_study(STUDIES / f"{path.stem}.yaml").runs()
    assert {result.run for result in results} <= set(runs)
    for base in dict.fromkeys(result.run.base for result in results):
        none, *others = standings(results, base)
        if "[" in others[0].method:
            others.sort(key=lambda standing: standing.difference.mean)
        assert markdown_table([none, *others]) in text, base


def test_table_of_convex_problems_is_that_of_the_lines() -> None:
    text = (STUDIES / "README.md").read_text()
    lines = (STUDIES / "results/convex.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert f"| {line['step_size']:.3f} |" in text
        assert f"| {line['measured']:.4f} |" in text
    assert text.count("quadratic |") + text.count("| logistic") == len(lines)


def test_results_in_the_readme_are_those_of_the_lines() -> None:
    readme = (STUDIES.parent.parent / "README.md").read_text()
    expected = []
    for name in ("late", "longer", "quiet"):
        study = load_study(STUDIES / f"{name}.yaml")
        results = read_lines(STUDIES / f"results/{name}.jsonl")
        for base in study.base_optimizers:
            found = {standing.method: standing for standing in standings(results, base)}
            none, ema = found["none"], found["ema_nesterov"]
            gap = ema.difference
            cells = [
                {"adamw": "AdamW", "muon": "Muon", "soap": "SOAP"}[base],
                f"{study.data['init_args']['batch_size']} | {study.num_steps:,}",
                f"{min(none.results)} to {max(none.results)}",
                *(f"{mean(x.finals):.4f} ± {stdev(x.finals):.4f}" for x in (none, ema)),
                f"{gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]",
            ]
            expected.append(f"| {' | '.join(cells)} |")
    rows = re.findall(r"^\| (?:AdamW|Muon|SOAP) \|.*$", readme, re.MULTILINE)
    assert rows == expected


def test_intervals_in_the_text_are_those_of_a_table() -> None:
    text, _, tables = (STUDIES / "README.md").read_text().partition("\n## noisy")
    intervals = re.findall(r"[+-]\d\.\d{4}\s\[[^\]]+\]", text)
    assert len(intervals) >= 10
    for interval in intervals:
        assert re.sub(r"\s+", " ", interval) in tables
