"""Bytes of text: of the running Python's standard library, or of the user's files."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from typing_extensions import override

from lightning_ema_nesterov.litgpt.data.base import WindowData
from lightning_ema_nesterov.litgpt.data.corpus import list_files, load_corpus

__all__ = ["StdlibBytes", "TextBytes"]


@dataclass(kw_only=True)
class StdlibBytes(WindowData):
    """Bytes of the running Python's standard library: the text and the split of the quickstart.

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
    """Bytes of a file or folder of the user's; whole files are held out.

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
