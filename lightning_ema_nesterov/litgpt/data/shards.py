"""Text that a LitGPT YAML names by ``data.class_path``: bytes of files, or shards of token ids."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

import numpy as np
from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_ema_nesterov.litgpt.data.corpus import list_files, load_corpus
from lightning_ema_nesterov.litgpt.data.windows import TokenArray, WindowLoader, fixed_windows
from lightning_ema_nesterov.litgpt.run import LitGPTRun

__all__ = ["StdlibBytes", "TextBytes", "TokenShards"]

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
_HEADER_LENGTH = 256
_NUM_CHECKED = 1_000_000
"""So many tokens of each shard are compared with the vocabulary, and not read as a whole."""


@dataclass(kw_only=True)
class _WindowData(DataModule):
    """What the data modules share: windows of memory-mapped token ids."""

    seed: int = 42
    batch_size: int = field(init=False, repr=False, default=1)
    window_size: int = field(init=False, repr=False, default=1)
    train_parts: Sequence[TokenArray] = field(init=False, repr=False, default=())
    val_parts: Sequence[TokenArray] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        super().__init__()

    @override
    def connect(
        self,
        tokenizer: Tokenizer | None = None,
        batch_size: int = 1,
        max_seq_length: int | None = None,
        **kwargs: object,
    ) -> None:
        """Take the size of a micro-batch and of a window from LitGPT."""
        self.batch_size = batch_size
        self.window_size = max_seq_length or 1

    @override
    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return shuffled batches that continue from a checkpoint."""
        return WindowLoader(
            self.train_parts,
            window_size=self.window_size,
            batch_size=self.batch_size,
            seed=self.seed,
        )

    @override
    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return batches that are the same in every evaluation."""
        return fixed_windows(
            self.val_parts, window_size=self.window_size, batch_size=self.batch_size
        )


@dataclass(kw_only=True)
class StdlibBytes(_WindowData):
    """Bytes of the running Python's standard library: the corpus and the split of the quickstart.

    Args:
        seed: Seed of the order of the windows, at least 0.
        cache_dir: Folder for the two parts, made once for each version of the text.
    """

    cache_dir: Path = Path("data/bytes")
    text: Path | None = field(init=False, repr=False, default=None)

    @override
    def prepare_data(self) -> None:
        """Write the two parts of the text, unless they are there."""
        folder = self._folder()
        if folder.exists():
            return
        corpus = load_corpus(self.text, window_size=self.window_size)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary, "made")
            made.mkdir()
            np.save(made / "train.npy", corpus.train.numpy())
            np.save(made / "validation.npy", corpus.validation.numpy())
            (made / "split.json").write_text(json.dumps(corpus.split, indent=1))
            try:
                made.rename(folder)  # whole or not at all
            except OSError:
                if not folder.exists():  # else another run made the same meanwhile
                    raise

    @override
    def setup(self, stage: str = "") -> None:
        """Map the two parts into memory."""
        folder = self._folder()
        self.train_parts = [np.load(folder / "train.npy", mmap_mode="r")]
        self.val_parts = [np.load(folder / "validation.npy", mmap_mode="r")]

    def _folder(self) -> Path:
        root, files = list_files(self.text)
        stats = [(name, path.stat()) for name, path in files.items()]
        listing = [str(root.resolve()), [(name, s.st_size, s.st_mtime_ns) for name, s in stats]]
        return self.cache_dir / hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]


@dataclass(kw_only=True)
class TextBytes(StdlibBytes):
    """Bytes of a file or folder, split as :func:`quickstart.corpus.load_corpus` does.

    Args:
        path: A file, or a folder whose text files are all read.
        seed: Seed of the order of the windows, at least 0.
        cache_dir: Folder for the two parts, made once for each version of the text.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
        ValueError: If ``path`` holds no text, or too little for one window.
    """

    path: Path

    def __post_init__(self) -> None:
        super().__post_init__()
        self.text = self.path

    @override
    def prepare_data(self) -> None:
        """Write the two parts of the text, unless they are there."""
        try:
            super().prepare_data()
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"data.init_args.path: {error}") from error


@dataclass(kw_only=True)
class TokenShards(_WindowData):
    """Token ids in binary shards, as the FineWeb shards for GPT-2 come.

    A shard is a header of 256 ``int32`` (20240520, 1, the number of tokens, zeros) and the tokens
    as ``uint16``. Each shard is one part: no window crosses from one to the next.

    Args:
        train: Pattern of the shards to train on, such as ``data/fineweb10B/fineweb_train_*.bin``.
        val: Pattern of the shards to validate on.
        seed: Seed of the order of the windows, at least 0.

    Raises:
        FileNotFoundError: If no file matches a pattern.
        ValueError: If a shard has another header, or not the length that its header tells, or
            begins with token ids that the model does not have.
    """

    train: str
    val: str

    @override
    def setup(self, stage: str = "") -> None:
        """Map the shards into memory."""
        self.train_parts = _open_shards(self.train, "train")
        self.val_parts = _open_shards(self.val, "val")


def _open_shards(pattern: str, key: str) -> list[TokenArray]:
    paths = sorted(map(Path, glob(pattern, recursive=True)))
    if not paths:
        raise FileNotFoundError(f"data.init_args.{key}: no file matches {pattern}.")
    parts = [_open_shard(path, key) for path in paths]
    run = LitGPTRun.find()
    for path, part in zip(paths, parts, strict=True):
        largest = int(part[:_NUM_CHECKED].max(initial=0))
        # On a GPU the lookup would end in an assertion that names neither.
        if run is not None and largest >= run.vocab_size:
            raise ValueError(
                f"data.init_args.{key}: {path} holds the token id {largest}, and the model has "
                f"{run.vocab_size}. Give shards of its tokenizer, or set model_config.vocab_size."
            )
    return parts


def _open_shard(path: Path, key: str) -> TokenArray:
    header = np.fromfile(path, dtype="<i4", count=_HEADER_LENGTH)
    if len(header) < _HEADER_LENGTH or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise ValueError(
            f"data.init_args.{key}: {path} does not begin with the header {SHARD_MAGIC}, "
            f"{SHARD_VERSION} of a token shard, got {header[:2].tolist()}."
        )
    num_tokens = int(header[2])
    expected = 4 * _HEADER_LENGTH + 2 * num_tokens
    if path.stat().st_size != expected:
        raise ValueError(
            f"data.init_args.{key}: {path} must have {expected} bytes for the {num_tokens} tokens "
            f"that its header tells, and has {path.stat().st_size}. Download it again."
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * _HEADER_LENGTH)
