"""Studies that were finished, stopped, killed or interrupted go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ema_nesterov.cli import main
from lightning_ema_nesterov.experiments.study import compare
from lightning_ema_nesterov.experiments.study.compare import run_study
from lightning_ema_nesterov.experiments.study.load import load_study
from lightning_ema_nesterov.experiments.study.results import read_lines
from lightning_ema_nesterov.experiments.study.spec import Run, Study
from lightning_ema_nesterov.experiments.study.train import train_run
from lightning_ema_nesterov.experiments.study.watch import StopsAtBatchEnd, Watch
from tests.experiments.toys import SGD, Data, Model, environment_with_tests, write
from tests.toys import Batches


def test_finished_runs_are_not_repeated_and_missing_ones_are(
    study_dir: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(study_dir, tmp_path / "out")

    def times() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in out.rglob("events.out.tfevents.*")}

    study, before = load_study(study_dir.parent / "study.yaml"), times()
    lines = out / "runs.jsonl"
    whole = lines.read_text()
    run_study(study, out)
    assert times() == before

    kept = whole.splitlines(keepends=True)
    lines.write_text("".join(kept[:-1]) + kept[-1][:20])  # stopped while it wrote the last one
    run_study(study, out)
    changed = {p for p, t in times().items() if before.get(p) != t}
    last = read_lines(lines)[-1]
    assert {p.parent for p in changed} == {out / "runs" / last.run.folder}
    values = [
        str(json.loads(line)["val_loss"][-1][2])
        for line in (kept[-1], lines.read_text().splitlines()[-1])
    ]
    assert values[0] == values[1]


@pytest.mark.slow
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


@pytest.mark.slow
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


class CtrlC(DataLoader[Tensor]):
    """It comes while the Trainer sets up its loaders."""

    def __iter__(self) -> Any:
        signal.raise_signal(signal.SIGINT)
        return super().__iter__()


class InterruptedData(Data):
    def train_dataloader(self) -> DataLoader[Tensor]:
        return CtrlC(Batches(30), batch_size=None)


def test_second_process_in_a_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(
        write(tmp_path, seeds=[0], methods={"none": None}, base_optimizers={"sgd": SGD})
    )
    refused = []

    def start_another(study: Study, run: Run, root: Path) -> None:
        before = (tmp_path / "out/study.json").read_text()
        with pytest.raises(ValueError, match=r"Another process trains in .*out: wait for it"):
            run_study(replace(study, num_steps=40), tmp_path / "out")
        assert (tmp_path / "out/study.json").read_text() == before
        refused.append(run)
        train_run(study, run, root)

    monkeypatch.setattr(compare, "train_run", start_another)
    run_study(study, tmp_path / "out")
    assert [result.run for result in read_lines(tmp_path / "out/runs.jsonl")] == refused
    monkeypatch.undo()
    run_study(study, tmp_path / "out")


class SkipsABatch(Model):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return None if batch_idx == 3 else super().training_step(batch, batch_idx)


def test_step_that_is_skipped_is_no_divergence(tmp_path: Path) -> None:
    model = {"class_path": f"{SkipsABatch.__module__}.SkipsABatch"}
    optimizers = {"sgd": SGD}
    study = load_study(
        write(tmp_path, model=model, methods={"none": None}, seeds=[0], base_optimizers=optimizers)
    )
    run_study(study, tmp_path / "out")
    found = read_lines(tmp_path / "out/runs.jsonl")
    assert len(found) == len(study.runs())
    assert not any(result.is_diverged for result in found)


def test_ctrl_c_waits_for_the_end_of_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once it would be a RuntimeError of the Trainer here, of loaders that are not set up."""
    seen = []
    monkeypatch.setattr(Watch, "on_train_batch_end", lambda *args: seen.append(args[-1]))
    study = load_study(
        write(tmp_path, data={"class_path": f"{InterruptedData.__module__}.InterruptedData"})
    )
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match="goes on from here"):
        run_study(study, tmp_path / "out")
    assert seen == [0]
    assert signal.getsignal(signal.SIGINT) is before


def press_ctrl_c(num_times: int, reached: list[int]) -> None:
    for number in range(num_times):
        signal.raise_signal(signal.SIGINT)
        reached.append(number)


@pytest.mark.parametrize("num_times", [1, 2])
def test_second_ctrl_c_does_not_wait(num_times: int) -> None:
    """The first is heeded also where no batch comes any more."""
    reached: list[int] = []
    with pytest.raises(KeyboardInterrupt), StopsAtBatchEnd().listening():
        press_ctrl_c(num_times, reached)
    assert reached == [0]


def test_ctrl_c_that_others_decided_about_stays_theirs() -> None:
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try:
        with StopsAtBatchEnd().listening():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [1]


def test_study_runs_outside_the_main_thread(tmp_path: Path) -> None:
    """Python lets only the main thread decide about Ctrl-C."""
    study = load_study(
        write(tmp_path, base_optimizers={"sgd": SGD}, methods={"none": None}, seeds=[0])
    )
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run_study, study, tmp_path / "out").result()
    assert len(read_lines(tmp_path / "out/runs.jsonl")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", ["1", "2"])
def test_model_beside_the_file_is_found(
    num_workers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And data in the current folder, of which Python's path says nothing."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/model_of_mine.py").write_text("from tests.experiments.toys import Model\n")
    (tmp_path / "data_of_mine.py").write_text("from tests.experiments.toys import Data\n")
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
