"""Data modules for LitGPT: what they read and write, and what is wrong with a file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_ema_nesterov.litgpt import StdlibBytes, TextBytes, TokenShards
from lightning_ema_nesterov.litgpt.data import bytes as data_module
from lightning_ema_nesterov.litgpt.data import corpus
from lightning_ema_nesterov.litgpt.data.corpus import load_corpus
from lightning_ema_nesterov.litgpt.data.windows import TokenArray, WindowLoader
from tests.litgpt.runs import Run, load, scalars

PARTS: list[TokenArray] = [np.arange(0, 21, dtype=np.uint16), np.arange(100, 133, dtype=np.uint16)]


def write_shard(
    path: Path, tokens: Any, *, magic: int = 20240520, count: int | None = None
) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, 1, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


@pytest.mark.slow
def test_standard_library_is_the_corpus_of_the_quickstart(tmp_path: Path) -> None:
    data = StdlibBytes(cache_dir=tmp_path)
    data.connect(batch_size=2, max_seq_length=64)
    data.prepare_data()
    data.setup()
    text = load_corpus(window_size=64)
    for parts, expected in ((data.train_parts, text.train), (data.val_parts, text.validation)):
        [part] = parts
        assert isinstance(part, np.memmap)
        assert torch.equal(torch.from_numpy(np.array(part)), expected)
    batch: Tensor = next(iter(data.train_dataloader()))
    assert batch.shape == (2, 65)
    assert batch.dtype == torch.int64


def test_two_runs_may_prepare_the_same_text_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A baseline and its overlay, started side by side: one comes second, with all written."""
    text = tmp_path / "text.txt"
    text.write_text("all work and no play makes Jack a dull boy. " * 100)
    first, second = (TextBytes(path=text, cache_dir=tmp_path / "cache") for _ in range(2))
    for data in (first, second):
        data.connect(batch_size=2, max_seq_length=16)

    def load_while_the_first_is_quicker(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(data_module, "load_corpus", load_corpus)
        first.prepare_data()
        return load_corpus(*args, **kwargs)

    monkeypatch.setattr(data_module, "load_corpus", load_while_the_first_is_quicker)
    second.prepare_data()
    second.setup()
    assert len(second.train_parts[0]) > 0
    assert len(list((tmp_path / "cache").iterdir())) == 1  # nothing half made is left


def test_text_is_read_again_when_it_changed(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"

    def first_byte(content: str) -> int:
        text.write_text(content)
        data = TextBytes(path=text, cache_dir=tmp_path / "cache")
        data.connect(batch_size=1, max_seq_length=4)
        data.prepare_data()
        made = sorted((tmp_path / "cache").iterdir())
        data.prepare_data()
        assert sorted((tmp_path / "cache").iterdir()) == made
        data.setup()
        return int(data.train_parts[0][0])

    assert first_byte("a" * 200) == ord("a")
    assert first_byte("b" * 201) == ord("b")


def test_a_progress_bar_appears_when_reading_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a" * 200)
    data = TextBytes(path=text, cache_dir=tmp_path / "cache")
    data.connect(batch_size=1, max_seq_length=4)
    data.prepare_data()
    assert not capsys.readouterr().err
    monkeypatch.setattr(corpus, "SECONDS_WITHOUT_PROGRESS", 0.0)
    text.write_text("b" * 201)
    data.prepare_data()
    assert "text.txt: 100%" in capsys.readouterr().err


def test_text_errors_name_the_key(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    data = TextBytes(path=text / "missing", cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data.init_args.path: .* does not exist"):
        data.prepare_data()
    (text / "short.txt").write_text("short")
    data = TextBytes(path=text, cache_dir=tmp_path)
    data.connect(batch_size=1, max_seq_length=64)
    with pytest.raises(ValueError, match=r"data.init_args.path: .* longer than one window of 64"):
        data.prepare_data()


def test_shards_are_mapped_and_read_in_windows(tmp_path: Path) -> None:
    for idx, part in enumerate(PARTS):
        write_shard(tmp_path / f"train_{idx}.bin", part)
    write_shard(tmp_path / "val.bin", [65535, *range(9)])
    data = TokenShards(train=f"{tmp_path}/train_*.bin", val=f"{tmp_path}/val.bin", seed=0)
    data.connect(batch_size=2, max_seq_length=4)
    data.setup()
    assert all(isinstance(part, np.memmap) for part in [*data.train_parts, *data.val_parts])
    expected = torch.stack(list(WindowLoader(PARTS, window_size=4, batch_size=2, seed=0)))
    assert torch.equal(torch.stack(list(data.train_dataloader())), expected)
    val = torch.cat(list(data.val_dataloader()))
    assert sorted(val.tolist()) == [[3, 4, 5, 6, 7], [65535, 0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"magic": 278895051}, "does not begin with the header 20240520, 1 of a token shard"),
        ({"count": 30}, "must have 1084 bytes for the 30 tokens .* and has 1064. Download"),
        (None, "does not begin with the header"),
    ],
)
def test_a_broken_shard_is_named(kwargs: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "train_000001.bin"
    if kwargs is None:
        path.write_bytes(b"\0" * 100)
    else:
        write_shard(path, range(20), **kwargs)
    data = TokenShards(train=str(path), val=str(path))
    with pytest.raises(ValueError, match=rf"data.init_args.train: .*train_000001.bin {message}"):
        data.setup()
    with pytest.raises(FileNotFoundError, match="no file matches"):
        TokenShards(train=f"{tmp_path}/*.npy", val="").setup()


NEW_MODULE = """
from dataclasses import dataclass

import numpy as np

from lightning_ema_nesterov.litgpt.data.base import WindowData


@dataclass(kw_only=True)
class Digits(WindowData):
    length: int = 200

    def setup(self, stage: str = "") -> None:
        self.train_parts = [np.arange(self.length, dtype=np.uint16) % 10]
        self.val_parts = [np.arange(100, dtype=np.uint16) % 10]
"""


def test_a_data_module_of_the_users_is_one_file(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "digits.py").write_text(NEW_MODULE)
    monkeypatch.syspath_prepend(folder)
    out = run(
        "--data.length",
        "500",
        data={"class_path": "digits.Digits", "init_args": {"seed": 1}},
        model_config={"vocab_size": 10, "padded_vocab_size": 10},
    )
    losses = list(scalars(out, "val_loss").values())
    assert losses[-1] < losses[0] < math.log(10) + 0.5
    # Where training is in the text is in the checkpoint.
    position = load(out / "final")["train_dataloader"]
    assert position["of"] == {"num_tokens": 500, "num_parts": 1, "window_size": 16, "seed": 1}
