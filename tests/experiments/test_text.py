"""The text that the quickstart and the studies train on, their model and their schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_ema_nesterov.experiments.data import TextWindows
from lightning_ema_nesterov.litgpt.data.corpus import load_corpus
from lightning_ema_nesterov.litgpt.data.windows import evenly_spaced
from tests.experiments.plain_loop import ByteLanguageModel, shuffled
from tests.experiments.toys import write_text


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


def test_step_of_windows_has_all_of_their_bytes_as_tokens() -> None:
    assert TextWindows(window_size=8, batch_size=2).tokens_per_batch == 16


def test_one_seed_gives_one_order_and_two_give_two(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(256)) * 20)

    def first_batch(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        data = TextWindows(str(text), window_size=8)
        data.setup("fit")
        batch: torch.Tensor = next(iter(data.train_dataloader()))
        return batch

    assert first_batch(0).shape == (8, 9)
    assert torch.equal(first_batch(0), first_batch(0))
    assert not torch.equal(first_batch(0), first_batch(1))
