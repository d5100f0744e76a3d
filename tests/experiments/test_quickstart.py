"""The quickstart: what it trains, says and leaves behind."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.data import DataLoader

from lightning_ema_nesterov import EMANesterov
from lightning_ema_nesterov.averages import average_checkpoint
from lightning_ema_nesterov.cli import main, quickstart
from lightning_ema_nesterov.experiments.data import TextWindows
from lightning_ema_nesterov.experiments.event_files import read_scalars
from lightning_ema_nesterov.experiments.model import ByteDecoder
from lightning_ema_nesterov.experiments.quickstart import RECIPES, Settings, make_study
from lightning_ema_nesterov.experiments.study.report import write_report
from lightning_ema_nesterov.experiments.study.results import read_event_folder
from lightning_ema_nesterov.experiments.study.spec import Run
from lightning_ema_nesterov.experiments.study.train import train_run
from lightning_ema_nesterov.litgpt.data.corpus import load_corpus
from lightning_ema_nesterov.litgpt.data.windows import evenly_spaced
from tests.experiments.plain_loop import ByteLanguageModel, shuffled
from tests.experiments.toys import ROOT, write_text

COMMAND = [sys.executable, "-m", "lightning_ema_nesterov.cli", "quickstart"]


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        check=False,
    )


def logged_hyperparameters(log_dir: Path) -> dict[str, float]:
    accumulator = EventAccumulator(str(log_dir))
    accumulator.Reload()
    content = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hyperparameters = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: value.number_value for name, value in hyperparameters.items()}


@pytest.mark.slow
def test_quickstart_trains_compares_and_draws(tmp_path: Path) -> None:
    text = write_text(tmp_path, 60)
    arguments = ["--num_steps", "40", "--text", str(text), "--lr", "0.01", "--seed", "3"]
    result = run(*arguments, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "arning" not in result.stderr
    assert "weights_only" not in result.stderr
    folder = tmp_path / "out/quickstart-trainer/run_0"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "results.json").read_text())
    assert record["settings"]["lr"] == 0.01
    assert record["num_threads"] == 1  # without a word about threads in the environment
    assert json.loads((folder / "split.json").read_text())["source"] == str(text)
    for name, step_size in (("none", 0.0), ("ema_nesterov", 0.5)):
        log_dir = folder / "runs" / "adamw" / name / "lr-0.01" / "seed-3"
        assert logged_hyperparameters(log_dir)["lookahead_step_size"] == step_size
        losses = read_scalars(log_dir)["val_loss"]
        assert losses[-1].step == 40  # the last step is validated
        assert losses[-1].value < losses[0].value
        perplexity = read_scalars(log_dir)["val_ppl"][-1].value
        assert perplexity == pytest.approx(torch.tensor(losses[-1].value).exp().item(), rel=1e-3)
        assert read_scalars(log_dir)["lr-AdamW"]
        assert read_scalars(log_dir)["hp/val_loss"]
        assert torch.load(log_dir / "final.ckpt", weights_only=False)["global_step"] == 40
    first = [record["val_loss"][name][0] for name in ("adamw", "adamw_ema_nesterov")]
    assert first[0] == first[1]  # the same start: warmup is not over
    assert record["val_loss"]["adamw"] != record["val_loss"]["adamw_ema_nesterov"]
    for name in ("step_size", "direction_norm", "displacement_norm", "alignment"):
        assert read_scalars(log_dir)[f"ema_nesterov/{name}"]
    check_what_is_said(result.stdout, record)
    check_the_average(record["val_loss"], log_dir / "final.ckpt", text)

    again = run(*arguments, folder=tmp_path)
    assert again.returncode == 0, again.stderr
    repeated = json.loads((folder.parent / "run_1" / "results.json").read_text())
    assert repeated["val_loss"] == record["val_loss"]
    # It is the folder of a study.
    assert "| ema_nesterov | 0.01 |" in (write_report(folder).parent / "report.md").read_text()


def check_the_average(losses: dict[str, Any], path: Path, text: Path) -> None:
    """The last loss of its curve is that of the averaged weights of the last checkpoint."""
    average_checkpoint(path, path.with_name("average.ckpt"))
    model = ByteDecoder(window_size=64)
    model.load_state_dict(torch.load(path.with_name("average.ckpt"))["state_dict"])
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    data = TextWindows(str(text), window_size=64, num_validation_windows=640)
    [found] = trainer.validate(model, data, verbose=False)
    last_step, last = losses["adamw_ema_nesterov_average"][-1]
    assert last_step == 40
    assert last == pytest.approx(found["val_loss"], rel=1e-5)
    assert abs(last - losses["adamw_ema_nesterov"][-1][1]) > 1e-2


def check_what_is_said(output: str, record: dict[str, Any]) -> None:
    start, _, end = output.partition("Validation loss in nats per byte")
    assert "Two runs of 40 steps with 1 thread: about 1 min" in start
    assert "steps to AdamW's final" in end
    found = record["comparison"]
    gap = found["final"] - found["baseline_final"]
    assert gap == record["val_loss"]["adamw_ema_nesterov"][-1][1] - found["baseline_final"]
    side = "lower" if gap < 0 else "higher"
    percent = 100 * abs(gap) / found["baseline_final"]
    assert f"{abs(gap):.4f} nats per byte ({percent:.1f}%) {side} than with AdamW alone" in end
    assert f"{found['baseline_final']:.4f}" in end
    assert "--seed 4 trains another" in end
    [at_x], [average] = (
        [loss for step, loss in record["val_loss"][f"adamw_ema_nesterov{kind}"] if step == 28]
        for kind in ("", "_average")
    )
    said = f"its loss is {at_x:.4f} at the weights and {average:.4f} at their average."
    assert f"At step 28, before the learning rate falls, {said}" in end
    # Not in a clone's root: the recipes are not here.
    assert "litgpt" not in output
    # The programs are those beside this Python, for a shell that knows nothing of it.
    [logs] = re.findall(
        r"^Logs: (.*tensorboard) --logdir out/quickstart-trainer/run_0$", end, re.MULTILINE
    )
    if shutil.which("tensorboard") is None:
        assert Path(logs) == Path(sys.executable).parent / "tensorboard"


@pytest.mark.slow
def test_numbers_are_those_of_a_plain_loop_of_the_trainer(tmp_path: Path) -> None:
    """The study's machinery trains what the quickstart trained before it had any.

    Its stored results come from a LightningModule with its own optimizer, and windows drawn at
    once: the same numbers to the last bit.
    """
    text = write_text(tmp_path, 60)
    settings = Settings(40, 3, 0.01, 0.5, 0.99)
    corpus = load_corpus(text, window_size=64)
    seed_everything(3, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=40,
        val_check_interval=2,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMANesterov(0.5, 0.99)],
    )
    trainer.fit(
        ByteLanguageModel(0.01, 40),
        DataLoader(shuffled(corpus.train, window_size=64, num_windows=320, seed=3), batch_size=8),
        DataLoader(
            evenly_spaced(corpus.validation, window_size=64, num_windows=640), batch_size=128
        ),
    )
    study = make_study(settings, text)
    finals = {}
    for method in study.methods:
        found = Run("adamw", method, 0.01, 3)
        train_run(study, found, tmp_path / "runs", is_watched=method != "none")
        finals[method] = read_event_folder(tmp_path / "runs" / found.folder).final
    assert finals["ema_nesterov"] == float(trainer.callback_metrics["val_loss"])
    assert finals["none"] != finals["ema_nesterov"]


@pytest.mark.slow
def test_run_that_diverges_is_said_to(tmp_path: Path) -> None:
    text = write_text(tmp_path, 60)
    result = run("--num_steps", "40", "--text", str(text), "--lr", "1e30", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "AdamW and AdamW with EMA-Nesterov diverged. Try a smaller --lr." in result.stdout
    assert (tmp_path / "out/quickstart-trainer/run_0/curves.png").exists()


def test_folder_is_not_that_of_the_litgpt_recipe() -> None:
    """Its curves are of another model, and TensorBoard would lay them over these."""
    default = inspect.signature(quickstart).parameters["out_dir"].default
    recipes = [
        yaml.safe_load(path.read_text()) for path in (ROOT / RECIPES[0]).parent.glob("*.yaml")
    ]
    assert len(recipes) == 4
    for recipe in recipes:
        assert default not in Path(recipe["out_dir"]).parents


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lookahead_step_size", "1"], "lookahead_step_size must be in"),
        (["--seed", "-1"], "seed must be in [0, 2 ** 32), got -1"),
        (["--num_threads", "0"], "num_threads must be at least 1, got 0"),
        (["--ema_decay", "1.5"], "ema_decay must be in [0, 1), got 1.5"),
        (["--text", "missing.txt"], "missing.txt does not exist"),
        (["--num_steps", "50"], "num_steps must be a positive multiple of 20"),
        (["--lr", "-1"], "lr must be above 0, got -1.0"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--num_steps", "many"], "num_steps"),
    ],
)
def test_bad_input_gets_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ema-nesterov", "quickstart", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code != 0
    said = f"{end.value.code}{capsys.readouterr().err}"
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_interrupted_run_leaves_logs_and_a_checkpoint_at_the_iterate(tmp_path: Path) -> None:
    text = write_text(tmp_path, 60)
    process = subprocess.Popen(
        [*COMMAND, "--num_steps", "400", "--text", str(text), "--out_dir", "out"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "errors").open("w"),
    )
    folder = tmp_path / "out/run_0/runs/adamw/ema_nesterov/lr-0.002/seed-0"
    deadline = time.monotonic() + 240
    while not list(folder.glob("checkpoints/step=60.ckpt")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    error = (tmp_path / "errors").read_text()
    assert "Stopped. Logs and checkpoints up to here: out/run_0" in error
    assert "Traceback" not in error
    assert read_scalars(folder)["val_loss"]
    saved = [torch.load(p, weights_only=False) for p in folder.glob("checkpoints/*.ckpt")]
    last = max(saved, key=lambda checkpoint: checkpoint["global_step"])
    assert last["global_step"] >= 60
    assert all(torch.isfinite(value).all() for value in last["state_dict"].values())
