"""The quickstart: its corpus, its model, its command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lightning_ema_nesterov.cli import main
from lightning_ema_nesterov.experiments.event_files import read_scalar
from lightning_ema_nesterov.experiments.model import ByteLanguageModel
from lightning_ema_nesterov.litgpt.data.corpus import load_corpus
from lightning_ema_nesterov.litgpt.data.windows import evenly_spaced, shuffled

COMMAND = [sys.executable, "-m", "lightning_ema_nesterov.cli", "quickstart"]


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
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


def write_text(folder: Path, num_files: int) -> Path:
    text = folder / "text"
    text.mkdir()
    for idx in range(num_files):
        (text / f"{idx}.txt").write_text(f"chapter {idx}: the quick brown fox jumps. " * 40)
    return text


def test_standard_library_is_split_by_whole_files() -> None:
    corpus = load_corpus(window_size=64)
    split = corpus.split
    train, held_out = set(split["train_files"]), set(split["validation_files"])
    assert not train & held_out
    assert {"abc.py", "json/decoder.py"} <= train | held_out
    assert not any("test" in name.split("/") for name in train | held_out)
    assert len(corpus.train) + len(corpus.validation) > 5_000_000
    share = len(corpus.validation) / (len(corpus.train) + len(corpus.validation))
    assert 0.05 <= share < 0.1
    again = load_corpus(window_size=64)
    assert torch.equal(corpus.train, again.train)
    assert again.split == split


def test_folder_of_text_is_split_and_equal_files_count_once(tmp_path: Path) -> None:
    text = write_text(tmp_path, 30)
    (text / "copy.txt").write_bytes((text / "7.txt").read_bytes())
    (text / "binary.bin").write_bytes(b"\0\1")
    (text / ".hidden").write_text("hidden")
    corpus = load_corpus(text, window_size=16)
    names = corpus.split["train_files"] + corpus.split["validation_files"]
    assert sorted(names) == sorted([f"{idx}.txt" for idx in range(30) if idx != 7] + ["7.txt"])
    assert len(corpus.split["validation_files"]) == 2  # 2 of 30 are over 5 %
    for name in corpus.split["validation_files"]:
        assert (text / name).read_bytes() not in corpus.train.numpy().tobytes()


def test_single_file_is_cut_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(range(1, 101)) * 10)
    for text in (path, tmp_path):
        corpus = load_corpus(text, window_size=16)
        joined = torch.cat([corpus.train, corpus.validation])
        assert joined.numpy().tobytes() == path.read_bytes()
        assert len(corpus.validation) == 50


def test_windows_are_reproducible_and_cover_the_text() -> None:
    data = torch.arange(200, dtype=torch.uint8)
    first = shuffled(data, window_size=9, num_windows=500, seed=1)
    again = shuffled(data, window_size=9, num_windows=500, seed=1)
    other = shuffled(data, window_size=9, num_windows=500, seed=2)
    windows = torch.stack([first[idx] for idx in range(len(first))])
    assert torch.equal(windows, torch.stack([again[idx] for idx in range(500)]))
    assert not torch.equal(windows, torch.stack([other[idx] for idx in range(500)]))
    assert windows.shape == (500, 10)
    assert windows.dtype == torch.long
    assert set(windows.flatten().tolist()) == set(range(200))
    spaced = evenly_spaced(data, window_size=9, num_windows=1000)
    assert len(spaced) == 1 + 190 // 9
    assert spaced[0][0] == 0
    assert spaced[len(spaced) - 1][-1] == 199


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "holds none"),
        (b"too short", "must be longer than one window of 64 bytes in both parts"),
    ],
)
def test_wrong_text_files_are_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_corpus(path, window_size=64)


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(ValueError, match="must hold at least one byte of text"):
        load_corpus(tmp_path, window_size=64)


def test_model_sees_only_the_past() -> None:
    torch.manual_seed(0)
    model = ByteLanguageModel(1e-3, 100).eval()
    window = torch.randint(256, (1, 64))
    changed = window.clone()
    changed[0, 40] += 1
    with torch.no_grad():
        first, second = model.model(window), model.model(changed % 256)
    assert torch.equal(first[0, :40], second[0, :40])
    assert not torch.equal(first[0, 40:], second[0, 40:])


def test_quickstart_trains_compares_and_draws(tmp_path: Path) -> None:
    text = write_text(tmp_path, 60)
    arguments = ["--num_steps", "40", "--text", str(text), "--lr", "0.01", "--seed", "3"]
    result = run(*arguments, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    folder = tmp_path / "out" / "quickstart" / "run_0"
    assert f"tensorboard --logdir {folder.relative_to(tmp_path)}" in result.stdout
    assert "steps to baseline's final" in result.stdout
    assert "curves.png" in result.stdout
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "results.json").read_text())
    assert record["settings"]["lr"] == 0.01
    assert json.loads((folder / "split.json").read_text())["source"] == str(text)
    for name, step_size in (("adamw", 0.0), ("adamw_ema_nesterov", 0.5)):
        assert logged_hyperparameters(folder / name)["lookahead_step_size"] == step_size
        losses = read_scalar(folder / name, "val_loss")
        assert losses[-1].step == 40  # the last step is validated
        assert losses[-1].value < losses[0].value
        perplexity = read_scalar(folder / name, "val_ppl")[-1].value
        assert perplexity == pytest.approx(torch.tensor(losses[-1].value).exp().item(), rel=1e-3)
        assert read_scalar(folder / name, "lr-AdamW")
        assert read_scalar(folder / name, "hp/val_loss")
        assert torch.load(folder / name / "final.ckpt", weights_only=False)["global_step"] == 40
    first = [record["val_loss"][name][0] for name in ("adamw", "adamw_ema_nesterov")]
    assert first[0] == first[1]  # the same start: warmup is not over
    assert record["val_loss"]["adamw"] != record["val_loss"]["adamw_ema_nesterov"]
    for name in ("step_size", "direction_norm", "displacement_norm", "alignment"):
        assert read_scalar(folder / "adamw_ema_nesterov", f"ema_nesterov/{name}")

    again = run(*arguments, folder=tmp_path)
    assert again.returncode == 0, again.stderr
    repeated = json.loads((folder.parent / "run_1" / "results.json").read_text())
    assert repeated["val_loss"] == record["val_loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lookahead_step_size", "1"], "lookahead_step_size must be in [0, 1), got 1.0"),
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


def test_interrupted_run_leaves_logs_and_a_checkpoint_at_the_iterate(tmp_path: Path) -> None:
    text = write_text(tmp_path, 60)
    process = subprocess.Popen(
        [*COMMAND, "--num_steps", "400", "--text", str(text), "--out_dir", "out"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    folder = tmp_path / "out" / "run_0" / "adamw_ema_nesterov"
    deadline = time.monotonic() + 240
    while not list(folder.glob("checkpoints/step=60.ckpt")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    assert read_scalar(folder, "val_loss")
    saved = [torch.load(p, weights_only=False) for p in folder.glob("checkpoints/*.ckpt")]
    last = max(saved, key=lambda checkpoint: checkpoint["global_step"])
    assert last["global_step"] >= 60
    assert all(torch.isfinite(value).all() for value in last["state_dict"].values())
