"""The order of the data, pinned: every published loss depends on it.

A digest here may only change together with all results that the project shows.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ema_nesterov.experiments.data import TextWindows
from lightning_ema_nesterov.litgpt import TextBytes, TokenShards
from lightning_ema_nesterov.litgpt.data import windows
from lightning_ema_nesterov.litgpt.data.corpus import load_corpus
from lightning_ema_nesterov.litgpt.data.windows import evenly_spaced
from tests.experiments.plain_loop import shuffled

WINDOW = 16
RANDOM = {0: "588f3934bfcf8c61", 7: "9bb450d9da62c409"}
HELD_OUT = "7ecf874ac10e3d4a"
ALL_HELD_OUT = "cf2cd35901e8353d"


def digest(batches: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for batch in batches:
        found.update(f"{batch.dtype} {tuple(batch.shape)};".encode())
        found.update(batch.numpy().tobytes())
    return found.hexdigest()[:16]


def noise(name: str, num_bytes: int) -> bytes:
    """Bytes that are the same with every version of every library."""
    blocks = [hashlib.sha256(f"{name} {i}".encode()).digest() for i in range(num_bytes // 32 + 1)]
    return b"".join(blocks)[:num_bytes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("order")
    text = folder / "text"
    text.mkdir()
    for idx in range(6):
        (text / f"{idx}.txt").write_text(noise(str(idx), 1000 + 100 * idx).hex())
    for idx in range(3):
        write_shard(folder / f"train_{idx}.bin", noise(f"shard {idx}", 2000 + 500 * idx))
    write_shard(folder / "val.bin", noise("val", 1200))
    return folder


def write_shard(path: Path, tokens: bytes) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens) // 2
    path.write_bytes(header.tobytes() + tokens)


@pytest.mark.parametrize("seed", RANDOM)
def test_windows_of_the_studies_and_of_the_quickstart(seed: int, folder: Path) -> None:
    torch.manual_seed(seed)
    study = TextWindows(
        str(folder / "text"), window_size=WINDOW, batch_size=4, num_validation_windows=9
    )
    study.setup("fit")
    assert digest(itertools.islice(study.train_dataloader(), 50)) == RANDOM[seed]
    assert digest(study.val_dataloader()) == HELD_OUT

    corpus = load_corpus(folder / "text", window_size=WINDOW)
    train = shuffled(corpus.train, window_size=WINDOW, num_windows=200, seed=seed)
    assert digest(DataLoader(train, batch_size=4)) == RANDOM[seed]
    for num_windows, expected in ((9, HELD_OUT), (10**6, ALL_HELD_OUT)):
        held_out = evenly_spaced(corpus.validation, window_size=WINDOW, num_windows=num_windows)
        assert digest(DataLoader(held_out, batch_size=128)) == expected


@pytest.mark.parametrize(
    ("ranks", "seed", "expected"),
    [
        ((0, 1), 42, ("d792c4a87cc88996", "0a1dbf6fe8b1f24c")),
        ((0, 1), 3, ("68fb94f35400cc7e", "0f8ad30bad2d8df5")),
        ((1, 2), 42, ("4164b0f144ce4a27", "90c5517e5d392ff8")),
        ((1, 2), 3, ("4bf216ec5273951c", "8f982dc786ccef1a")),
    ],
)
def test_windows_of_the_data_modules_for_litgpt(
    ranks: tuple[int, int],
    seed: int,
    expected: tuple[str, str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two epochs and five batches of one process, of text and of shards."""
    monkeypatch.setattr(windows, "_rank", lambda: ranks)
    modules = (
        TextBytes(path=folder / "text", cache_dir=folder / "cache", seed=seed),
        TokenShards(train=f"{folder}/train_*.bin", val=f"{folder}/val.bin", seed=seed),
    )
    held_out = ("1da26432550ae737", "2370c98e3a17607a")
    for data, train_digest, val_digest in zip(modules, expected, held_out, strict=True):
        data.connect(batch_size=3, max_seq_length=WINDOW)
        data.prepare_data()
        data.setup()
        num_windows = sum((len(part) - 1) // WINDOW for part in data.train_parts)
        num_batches = 2 * (num_windows // (3 * ranks[1])) + 5
        batches = endless(data.train_dataloader())
        assert digest(itertools.islice(batches, num_batches)) == train_digest
        assert digest(data.val_dataloader()) == val_digest


def endless(loader: DataLoader[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from loader
