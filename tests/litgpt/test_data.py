"""Windows of text for LitGPT: their order, their state, and what is wrong with a file."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_ema_nesterov.litgpt import StdlibBytes, TextBytes, TokenShards
from lightning_ema_nesterov.litgpt.data import bytes as data_module
from lightning_ema_nesterov.litgpt.data import corpus, windows
from lightning_ema_nesterov.litgpt.data.corpus import load_corpus
from lightning_ema_nesterov.litgpt.data.windows import WindowLoader, fixed_windows

PARTS = [np.arange(0, 21, dtype=np.uint16), np.arange(100, 133, dtype=np.uint16)]
# Windows of 4 tokens and a target: 5 in the first part, 8 in the second.
STARTS = [*range(0, 20, 4), *range(100, 132, 4)]


def make_loader(batch_size: int = 2, seed: int = 0, window_size: int = 4) -> WindowLoader:
    return WindowLoader(PARTS, window_size=window_size, batch_size=batch_size, seed=seed)


def pretend_rank(monkeypatch: pytest.MonkeyPatch, rank: int, num_ranks: int) -> None:
    monkeypatch.setattr(windows, "_rank", lambda: (rank, num_ranks))


def write_shard(
    path: Path, tokens: Any, *, magic: int = 20240520, count: int | None = None
) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, 1, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def through_bytes(state: dict[str, Any]) -> dict[str, Any]:
    """What ``torch.load`` gives that allows nothing but numbers and tensors."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert buffer.tell() < 2000
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def test_an_epoch_has_every_window_once_in_an_order_of_its_own() -> None:
    loader = make_loader(batch_size=1)
    epochs = [torch.cat(list(loader)) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == STARTS
        assert torch.equal(epoch - epoch[:, :1], torch.arange(5).expand(13, 5))
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[0], torch.cat(list(make_loader(batch_size=1))))
    assert not torch.equal(epochs[0], torch.cat(list(make_loader(batch_size=1, seed=1))))


def test_processes_share_the_windows_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(make_loader(batch_size=4))
    pretend_rank(monkeypatch, 0, 2)
    first = list(make_loader())
    pretend_rank(monkeypatch, 1, 2)
    second = list(make_loader())
    assert len(first) == len(second) == 3
    for batch, *halves in zip(whole, first, second, strict=True):
        assert torch.equal(batch, torch.cat(halves))


@pytest.mark.parametrize("num_taken", [2, 6, 7])
def test_order_continues_exactly_from_a_state(num_taken: int) -> None:
    """In an epoch, at its end, and in the next one."""

    def endless(loader: WindowLoader) -> Any:
        while True:
            yield from loader

    whole = make_loader()
    batches = endless(whole)
    for _ in range(num_taken):
        next(batches)
    resumed = make_loader()
    resumed.load_state_dict(through_bytes(whole.state_dict()))
    expected = [next(batches) for _ in range(9)]
    found = endless(resumed)
    assert torch.equal(torch.stack([next(found) for _ in range(9)]), torch.stack(expected))


def test_other_number_of_processes_continues_with_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = make_loader()
    taken = [batch for _, batch in zip(range(3), one, strict=False)]
    state = one.state_dict()
    rest = []
    for rank in range(3):
        pretend_rank(monkeypatch, rank, 3)
        loader = make_loader()
        loader.load_state_dict(state)
        rest += list(loader)
    seen = Counter(torch.cat([*taken, *rest])[:, 0].tolist())
    assert set(seen.values()) == {1}
    assert len(seen) == 12


def test_another_text_is_refused() -> None:
    state = make_loader().state_dict()
    for other in (make_loader(seed=1), make_loader(window_size=5)):
        with pytest.raises(ValueError, match="The checkpoint was made with the text"):
            other.load_state_dict(state)


def test_validation_is_the_same_on_every_process_and_in_every_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loader = fixed_windows(PARTS, window_size=4, batch_size=4)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [4, 4, 4]  # 13 windows: one is left out
    starts = torch.cat(batches)[:, 0].tolist()
    assert len(set(starts)) == 12
    assert set(starts) <= set(STARTS)
    assert starts != sorted(starts)
    pretend_rank(monkeypatch, 1, 2)
    assert torch.equal(torch.cat(list(loader)), torch.cat(batches))
    assert [len(b) for b in fixed_windows(PARTS, window_size=4, batch_size=20)] == [13]


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"data: the training text must hold 20 windows of 4 tokens.* and holds 13"
    ):
        make_loader(batch_size=20)
    with pytest.raises(
        ValueError, match="data: the validation text must hold one window of 40 tokens"
    ):
        fixed_windows(PARTS, window_size=40, batch_size=1)


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
    expected = torch.stack(list(make_loader()))
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
